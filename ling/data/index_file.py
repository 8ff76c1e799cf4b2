"""Megatron's indexed format, read and checked without megatron-core: PREFIX.idx says where PREFIX.bin's documents lie.

PREFIX.idx is little-endian: magic (9 bytes), version (u64), code of the token type (u8), number of sequences N (u64),
number of document marks D (u64), then lengths (int32[N], in tokens), pointers (int64[N], in bytes), marks (int64[D]).
A sequence is a document here, as it is for megatron-core's GPT dataset. PREFIX.json is what `ling data prepare` adds.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ling.config.errors import UserError
from ling.data.mapping import map_file, part_of

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {4: np.int32, 5: np.int64, 8: np.uint16}  # those that token ids come in
CODES = {dtype: code for code, dtype in DTYPES.items()}
AGAIN = "copy it again, or prepare it again with `ling data prepare`"


@dataclass(frozen=True)
class Index:
    """The documents of one prefix: memory-mapped, nothing is read before it is asked for."""

    prefix: str
    dtype: np.dtype[Any]
    lengths: np.ndarray  # int32 [N], tokens
    pointers: np.ndarray  # int64 [N], bytes into PREFIX.bin

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, from the last document's place alone."""
        if not self.num_documents:
            return 0
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    def tokens_before(self, document: int) -> int:
        """Tokens of all documents in front of this one."""
        if document >= self.num_documents:
            return self.num_tokens
        return int(self.pointers[document]) // self.dtype.itemsize

    def marks(self) -> np.ndarray:
        """The document marks at the end of PREFIX.idx: int64 [D], numbers of the sequences that begin documents."""
        path = Path(self.prefix + ".idx")
        mapped, offset = map_file(path), HEADER.size + 12 * self.num_documents
        return part_of(mapped, "<i8", (len(mapped) - offset) // 8, offset)

    def identity(self) -> tuple[int, int, str]:
        """What tells this index from others without reading it: size, time of the last change, hash of its ends."""
        found = Path(self.prefix + ".idx").stat()
        ends = np.concatenate([self.lengths[:512], self.lengths[-512:], self.pointers[-512:]])
        return found.st_size, found.st_mtime_ns, hashlib.sha256(ends.tobytes()).hexdigest()

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens of PREFIX.bin in the order of the file, memory-mapped."""
        return part_of(map_file(self.prefix + ".bin"), self.dtype, self.num_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the name, not the data: a worker process opens the files itself."""
        return read_index, (self.prefix,)


def read_index(prefix: str) -> Index:
    """Open PREFIX.bin and PREFIX.idx and hold their sizes against each other, at a cost that does not grow with them.

    Raises UserError where a file is missing, truncated, not of this format, or without a document.
    """
    idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
    for file in (idx, bin_):
        if not file.is_file():
            hint = f" (give the prefix without {prefix[-4:]})" if prefix.endswith((".bin", ".idx")) else ""
            raise UserError(
                f"data {prefix}: {file} is missing{hint}; make it with `ling data prepare --output {prefix}`"
            )
    size = idx.stat().st_size
    with idx.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or header[:9] != MAGIC:
        raise UserError(f"{idx} is no Megatron index: {AGAIN}")
    _, version, code, sequences, marks = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise UserError(f"{idx}: version {version} with token type {code} is not read: {AGAIN}")
    wanted = HEADER.size + 12 * sequences + 8 * marks
    if size != wanted:
        what = "truncated" if size < wanted else "longer than it says"
        raise UserError(f"{idx} is {what}: {size} bytes where its header promises {wanted}; {AGAIN}")
    if not sequences:
        raise UserError(f"data {prefix} has no documents: prepare it from input that has text")
    mapped = map_file(idx)
    lengths = part_of(mapped, "<i4", sequences, HEADER.size)
    pointers = part_of(mapped, "<i8", sequences, HEADER.size + 4 * sequences)
    index = Index(prefix, np.dtype(DTYPES[code]), lengths, pointers)
    promised, there = index.num_tokens * index.dtype.itemsize, bin_.stat().st_size
    if promised != there:
        what = "truncated" if there < promised else "longer than its index"
        raise UserError(f"{bin_} is {what}: {there} bytes where {idx.name} promises {promised}; {AGAIN}")
    return index


def read_side_file(prefix: str) -> dict[str, Any] | None:
    """What `ling data prepare` noted in PREFIX.json; None where there is none (data of another tool)."""
    path = Path(prefix + ".json")
    if not path.exists():
        return None
    try:
        side = json.loads(path.read_bytes())
        side["tokenizer"]["fingerprint"], side["tokenizer"]["vocab_size"], side["documents"], side["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no side file of `ling data prepare` ({error}): {AGAIN}") from error
    return side


def check_prefix(prefix: str, fingerprint: str | None = None) -> Index:
    """`read_index`, and the side file against the index and, where given, against a tokenizer's fingerprint.

    Data without a side file passes: it was made by another tool, and nothing is known of its tokenizer.
    """
    index = read_index(prefix)
    side = read_side_file(prefix)
    if side is None:
        return index
    if (side["documents"], side["tokens"]) != (index.num_documents, index.num_tokens):
        raise UserError(
            f"{prefix}.json tells of {side['documents']} documents and {side['tokens']} tokens, {prefix}.idx of "
            f"{index.num_documents} and {index.num_tokens}: the files are of two preparations; {AGAIN}"
        )
    noted = side["tokenizer"]["fingerprint"]
    if fingerprint is not None and noted != fingerprint:
        raise UserError(
            f"data {prefix} was prepared with another tokenizer (fingerprint {noted[:8]}, this run's is "
            f"{fingerprint[:8]}): set data.tokenizer to that one, or prepare the data again with this one"
        )
    return index
