"""What is in a prepared data set: totals, lengths, vocabulary use, unigram entropy; and whether its files are whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ling.config.errors import UserError
from ling.data.index_file import AGAIN, Index, check_prefix, read_side_file
from ling.data.tokenizer import Tokenizer

BLOCK_TOKENS = 1 << 24
BLOCK_DOCUMENTS = 1 << 20


@dataclass(frozen=True)
class Statistics:
    """Statistics of one prefix; lengths in tokens, the entropy in nats per token."""

    prefix: str
    documents: int
    tokens: int
    dtype: str
    shortest: int
    median: int
    longest: int
    length_histogram: dict[str, int]  # "256-511" -> documents
    ids_used: int
    largest_id: int
    vocab_size: int | None  # of the tokenizer that made it; None where no side file tells
    unigram_entropy: float
    side: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def unigram_entropy(prefix: str) -> float:
    """Entropy of the token frequencies in nats per token: the loss of a model that knows nothing but them."""
    return _entropy(token_counts(check_prefix(prefix)))


def token_counts(index: Index) -> np.ndarray:
    """How often each token id occurs: int64 [largest id + 1]. Raises UserError for negative ids."""
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, index.num_tokens, BLOCK_TOKENS):
        block = index.tokens[start : start + BLOCK_TOKENS]
        if block.dtype.kind == "i" and int(block.min()) < 0:
            raise UserError(f"{index.prefix}.bin has the token id {int(block.min())}: {AGAIN}")
        part = np.bincount(block, minlength=len(counts))
        part[: len(counts)] += counts
        counts = part
    return counts


def statistics(prefix: str, tokenizer: Tokenizer | None = None) -> Statistics:
    """Read the whole data set: check it and describe it.

    Raises UserError where the files are damaged, where an index entry does not follow on the one before, where the
    side file disagrees, where a document of ours has no end token, where a token id is beyond the vocabulary, or where
    `tokenizer` is not the one that made it.
    """
    index = check_prefix(prefix, tokenizer.fingerprint if tokenizer else None)
    lengths = np.asarray(index.lengths).astype(np.int64)
    expected = (np.cumsum(lengths) - lengths) * index.dtype.itemsize
    wrong = np.flatnonzero((lengths < 0) | (expected != index.pointers))
    if len(wrong):
        raise UserError(f"{prefix}.idx: document {wrong[0]} does not follow on the one before it: {AGAIN}")
    side = read_side_file(prefix)
    if side is not None:
        _check_documents(index, int(side["tokenizer"].get("eos_id", -1)))
    counts = token_counts(index)
    vocab_size = side["tokenizer"]["vocab_size"] if side else tokenizer.vocab_size if tokenizer else None
    if vocab_size is not None and len(counts) > vocab_size:
        raise UserError(f"{prefix}.bin has the token id {len(counts) - 1}, its tokenizer {vocab_size} tokens: {AGAIN}")
    return Statistics(
        prefix=prefix,
        documents=index.num_documents,
        tokens=index.num_tokens,
        dtype=index.dtype.name,
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=int(lengths.max()),
        length_histogram=_histogram(lengths),
        ids_used=int(np.count_nonzero(counts)),
        largest_id=len(counts) - 1,
        vocab_size=vocab_size,
        unigram_entropy=_entropy(counts),
        side=side,
    )


def first_documents(prefix: str, tokenizer: Tokenizer, count: int) -> list[str]:
    """The text of the first `count` documents, decoded, their end tokens left out."""
    index = check_prefix(prefix, tokenizer.fingerprint)
    texts = []
    for number in range(min(count, index.num_documents)):
        first = int(index.pointers[number]) // index.dtype.itemsize
        ids = index.tokens[first : first + int(index.lengths[number])].tolist()
        texts.append(tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids))
    return texts


def _check_documents(index: Index, eos_id: int) -> None:
    """What holds of data that `ling data prepare` made: a mark for each document, and an end token on each."""
    if not np.array_equal(index.marks(), np.arange(index.num_documents + 1)):
        raise UserError(f"{index.prefix}.idx: the document marks do not count the documents: {AGAIN}")
    for start in range(0, index.num_documents, BLOCK_DOCUMENTS):
        block = slice(start, start + BLOCK_DOCUMENTS)
        last = index.pointers[block] // index.dtype.itemsize + index.lengths[block] - 1
        wrong = np.flatnonzero(index.tokens[last] != eos_id)
        if len(wrong):
            raise UserError(f"{index.prefix}.bin: document {start + wrong[0]} has no end token: {AGAIN}")


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _histogram(lengths: np.ndarray) -> dict[str, int]:
    """Documents by length, in ranges that double: 0, 1, 2-3, 4-7, ..."""
    classes = np.frexp(lengths.astype(np.float64))[1]  # 0 for 0, k for 2^(k-1) to 2^k - 1
    histogram = {}
    for k in range(int(classes.min()), int(classes.max()) + 1):
        low, high = (1 << k) >> 1, (1 << k) - 1
        histogram[f"{low}-{high}" if high > low else str(low)] = int(np.count_nonzero(classes == k))
    return histogram
