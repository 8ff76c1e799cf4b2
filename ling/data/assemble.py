"""From encoded documents to outputs: duplicates left out, splits by hash, and Megatron's index. Memory is bounded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ling.data.index_file import CODES, HEADER, MAGIC

BLOCK_DOCUMENTS = 1 << 18
BUCKET_DOCUMENTS = 1 << 21
MOST_BUCKETS_BITS = 9  # each is an open file
DROPPED = 255
MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass
class Part:
    """What one output got: documents, tokens, and bytes of text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype[Any]) -> None:
    """Write Megatron's index of documents that lie one after the other; lengths int32 [N], in tokens."""
    count = len(lengths)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, CODES[dtype.type], count, count + 1))
        for block in _blocks(count):
            file.write(np.ascontiguousarray(lengths[block], dtype="<i4").tobytes())
        start = 0
        for block in _blocks(count):
            ends = start + np.cumsum(lengths[block], dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes())
            start = int(ends[-1])
        for block in _blocks(count + 1):
            file.write(np.arange(block.start, block.stop, dtype="<i8").tobytes())


def choose(
    documents: np.ndarray, folder: Path, deduplicate: bool, fractions: Sequence[float], seed: int
) -> tuple[np.ndarray, int]:
    """The output of each document, on disk in `folder`: uint8 [N], and how many duplicates were dropped.

    documents: with `digest` uint64 [N, 2], the hash of the text. Of equal texts the first one stays. fractions: shares
    of the outputs from 1 on; output 0 gets the rest. DROPPED marks duplicates.
    """
    target = np.memmap(folder / "outputs.tmp", dtype=np.uint8, mode="w+", shape=(len(documents),))
    bounds = np.cumsum(fractions)
    for block in _blocks(len(documents)):
        share = split_value(documents["digest"][block, 0], seed)
        inside = np.searchsorted(bounds, share, side="right")
        target[block] = np.where(inside < len(bounds), inside + 1, 0)
    dropped = 0
    if deduplicate:
        for numbers in _repeats(documents, folder):
            target[numbers] = DROPPED
            dropped += len(numbers)
    return target, dropped


def split_value(digests: np.ndarray, seed: int) -> np.ndarray:
    """Where hashes lie in [0, 1), by a seed: float64 [N] from uint64 [N]. The mixing is that of SplitMix64."""
    return _mixed(digests ^ _mixed(np.array([seed], dtype=np.uint64))) / 2.0**64


def route(
    tokens: np.ndarray, documents: np.ndarray, target: np.ndarray, folder: Path, names: Sequence[str]
) -> list[Part]:
    """Write folder/NAME.bin and .idx of each output from the tokens of all documents, in their order."""
    parts = [Part() for _ in names]
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in names]
        lengths = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in names]
        end = 0
        for block in _blocks(len(documents)):
            sizes, chosen = documents["tokens"][block], target[block]
            ends = end + np.cumsum(sizes, dtype=np.int64)
            for first, last in _runs(chosen):
                start, end = end, int(ends[last])
                if chosen[first] != DROPPED:
                    files[chosen[first]].write(tokens[start:end])
            for number, part in enumerate(parts):
                mine = chosen == number
                lengths[number].write(sizes[mine].tobytes())
                part.documents += int(mine.sum())
                part.tokens += int(sizes[mine].sum(dtype=np.int64))
                part.bytes += int(documents["bytes"][block][mine].sum(dtype=np.int64))
        for name, part, file in zip(names, parts, lengths, strict=True):
            if part.documents:
                write_index(folder / f"{name}.idx", _mapped(file, np.dtype("<i4")), tokens.dtype)
    return parts


def _repeats(documents: np.ndarray, folder: Path) -> Iterator[np.ndarray]:
    """Numbers of documents whose digest an earlier one has, by a sort on disk: buckets by the digest's top bits."""
    record = np.dtype([("digest", "<u8", (2,)), ("number", "<i8")])
    bits = min((len(documents) // BUCKET_DOCUMENTS).bit_length(), MOST_BUCKETS_BITS)
    with ExitStack() as stack:
        buckets = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(1 << bits)]
        for block in _blocks(len(documents)):
            entries = np.empty(block.stop - block.start, record)
            entries["digest"] = documents["digest"][block]
            entries["number"] = np.arange(block.start, block.stop)
            top = entries["digest"][:, 0] >> np.uint64(64 - bits) if bits else np.zeros(len(entries), np.uint64)
            order = np.argsort(top, kind="stable")
            cuts = np.searchsorted(top[order], np.arange(1, 1 << bits, dtype=np.uint64))
            for bucket, some in zip(buckets, np.split(entries[order], cuts), strict=True):
                bucket.write(some.tobytes())
        for bucket in buckets:
            entries = _mapped(bucket, record)
            order = np.lexsort((entries["number"], entries["digest"][:, 1], entries["digest"][:, 0]))
            digests = entries["digest"][order]
            repeated = np.flatnonzero((digests[1:] == digests[:-1]).all(axis=1)) + 1
            yield entries["number"][order[repeated]]


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last place of each run of equal values."""
    cuts = np.flatnonzero(np.diff(values)) + 1
    return zip([0, *cuts.tolist()], [*(cuts - 1).tolist(), len(values) - 1], strict=True)


def _mapped(file: IO[bytes], dtype: np.dtype[Any]) -> np.ndarray:
    file.flush()
    size = file.seek(0, 2)
    return np.memmap(file, dtype=dtype, mode="r") if size else np.empty(0, dtype)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK_DOCUMENTS, count)) for start in range(0, count, BLOCK_DOCUMENTS))


def _mixed(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(MIX[0])
    values = (values ^ (values >> np.uint64(30))) * np.uint64(MIX[1])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(MIX[2])
    return values ^ (values >> np.uint64(31))
