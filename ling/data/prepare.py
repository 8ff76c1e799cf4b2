"""Text in, tokens out: Megatron's indexed format, one document per record, each with its end token.

The files' bytes depend on the input, the tokenizer and the options, never on the number of worker processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from ling.config.errors import UserError
from ling.data.records import BadRecordError, Record, Source, check_inputs, check_separator, is_jsonl, record_text
from ling.data.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
CHUNK_BYTES = 1 << 20
CHUNK_RECORDS = 1024
QUEUE_PER_WORKER = 4  # chunks in flight; bounds the memory
BAD_RECORDS_SHOWN = 10
ON_ERROR = ("stop", "skip")


class Chunk(NamedTuple):
    """Some neighbouring records of one file, on their way to a worker."""

    tokenizer: str
    path: Path
    field: str
    records: list[Record]


class Encoded(NamedTuple):
    """What a worker makes of a chunk: the documents' tokens one after the other, and what was met on the way."""

    ids: np.ndarray  # int32 [sum of lengths]
    lengths: list[int]  # tokens of each document, its end token included
    text_bytes: int
    empty: int
    mended: int
    bad: list[str]


@dataclass
class Counts:
    """Running totals of a preparation; `bad` holds the first bad records as `file:line: reason`."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty_documents: int = 0
    mended_documents: int = 0
    bad_records: int = 0
    bad: list[str] = field(default_factory=list)

    def add(self, encoded: Encoded) -> None:
        """Count one chunk."""
        self.documents += len(encoded.lengths)
        self.tokens += len(encoded.ids)
        self.bytes += encoded.text_bytes
        self.empty_documents += encoded.empty
        self.mended_documents += encoded.mended
        self.bad_records += len(encoded.bad)
        self.bad += encoded.bad[: BAD_RECORDS_SHOWN - len(self.bad)]


class Progress:
    """A line on `stream` with the share done, the rate and the time left; silent for work that takes seconds."""

    def __init__(self, total_bytes: int, stream: TextIO | None) -> None:
        self._total, self._stream = max(total_bytes, 1), stream
        self._start = self._last = time.monotonic()
        self._shown = False

    def update(self, done_bytes: int, tokens: int) -> None:
        """Show the state, at most every two seconds (every ten where the stream is no terminal)."""
        now = time.monotonic()
        if self._stream is None or now - self._last < (2 if self._stream.isatty() else 10):
            return
        self._last, self._shown = now, True
        seconds, share = now - self._start, min(done_bytes / self._total, 1.0)
        left = f"{seconds * (1 - share) / share:.0f} s left" if share else "time left unknown"
        line = f"{share:6.1%} of {self._total / 2**20:.1f} MiB, {tokens / seconds:,.0f} tokens/s, {left}"
        self._stream.write(f"\r{line}   " if self._stream.isatty() else f"{line}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line."""
        if self._shown and self._stream is not None and self._stream.isatty():
            self._stream.write("\n")


def prepare(
    inputs: Sequence[Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    field: str = "text",
    separator: str | None = None,
    on_error: str = "stop",
    workers: int = 1,
    progress: TextIO | None = None,
) -> Counts:
    """Write `output`.bin, .idx and .json (the side file) from text and JSONL files, in the order given.

    field: where a JSONL record holds its text. separator: see `Source.records`. on_error: what a bad JSONL line does.
    workers: processes that tokenize. progress: where to show it. Raises UserError for bad input or an output that
    exists; then no file is left behind. The index appears last, so a prefix that has one is complete.
    """
    total_bytes = check_inputs(inputs)
    check_separator(separator)
    if workers < 1:
        raise UserError(f"--workers {workers}: give 1 or more")
    if on_error not in ON_ERROR:
        raise UserError(f"--on-error {on_error}: choose one of {', '.join(ON_ERROR)}")
    for suffix in (".bin", ".idx", ".json"):
        if Path(f"{output}{suffix}").exists():
            raise UserError(f"{output}{suffix} exists already: choose another --output, or remove it")
    tokenizer = load_tokenizer(tokenizer_path)
    sources = [Source(path) for path in inputs]
    options = {"field": field, "document_separator": separator, "on_error": on_error}
    final = Path(output)
    partial = str(final.with_name(f".{final.name}.partial-{os.getpid()}"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        encoded = _encode_all(_chunks(sources, str(tokenizer_path), field, separator), workers)
        shown = _with_progress(encoded, sources, total_bytes, progress)
        counts, dtype = _write(partial, shown, tokenizer, on_error)
        side = _side_file(tokenizer, counts, dtype, options, sources)
        Path(partial + ".json").write_text(json.dumps(side, indent=2) + "\n")
        for suffix in (".json", ".bin", ".idx"):
            os.replace(partial + suffix, f"{output}{suffix}")
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error})") from error
    finally:
        for suffix in (".json", ".bin", ".idx"):
            with contextlib.suppress(OSError):
                Path(partial + suffix).unlink(missing_ok=True)
    return counts


def _chunks(sources: Sequence[Source], tokenizer: str, field: str, separator: str | None) -> Iterator[Chunk]:
    for source in sources:
        records: list[Record] = []
        size = 0
        for record in source.records(separator):
            records.append(record)
            size += len(record.raw)
            if size >= CHUNK_BYTES or len(records) >= CHUNK_RECORDS:
                yield Chunk(tokenizer, source.path, field, records)
                records, size = [], 0
        if records:
            yield Chunk(tokenizer, source.path, field, records)


def _encode_all(chunks: Iterable[Chunk], workers: int) -> Iterator[Encoded]:
    """The chunks' encodings in order, with a bounded number of them in flight."""
    if workers == 1:
        yield from map(_encode, chunks)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending: deque[Future[Encoded]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_encode, chunk))
                if len(pending) >= QUEUE_PER_WORKER * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _encode(chunk: Chunk) -> Encoded:
    tokenizer = _cached_tokenizer(chunk.tokenizer)
    jsonl = is_jsonl(chunk.path)
    documents: list[list[int]] = []
    bad: list[str] = []
    text_bytes = empty = mended = 0
    for record in chunk.records:
        try:
            text, was_mended = record_text(record, jsonl, chunk.field)
        except BadRecordError as error:
            bad.append(f"{chunk.path}:{record.line}: {error}")
            continue
        if not text.strip():
            empty += 1
            continue
        text_bytes += len(text.encode("utf-8"))
        mended += was_mended
        documents.append([*tokenizer.encode(text), tokenizer.eos_id])
    lengths = [len(ids) for ids in documents]
    ids = np.fromiter(chain.from_iterable(documents), dtype=np.int32, count=sum(lengths))
    return Encoded(ids, lengths, text_bytes, empty, mended, bad)


@lru_cache(maxsize=1)
def _cached_tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path)


def _with_progress(
    encoded: Iterable[Encoded], sources: Sequence[Source], total_bytes: int, stream: TextIO | None
) -> Iterator[Encoded]:
    line = Progress(total_bytes, stream)
    tokens = 0
    for part in encoded:
        tokens += len(part.ids)
        line.update(sum(source.bytes_read for source in sources), tokens)
        yield part
    line.close()


def _write(partial: str, encoded: Iterable[Encoded], tokenizer: Tokenizer, on_error: str) -> tuple[Counts, str]:
    """Write partial.bin and partial.idx; returns the totals and the name of the token type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core tells of its optional packages at import
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(partial + ".bin", dtype=dtype)
    counts = Counts()
    try:
        for part in encoded:
            if part.bad and on_error == "stop":
                raise UserError(f"{part.bad[0]}; mend the line, or leave such lines out with --on-error skip")
            counts.add(part)
            start = 0
            for length in part.lengths:
                builder.add_document(part.ids[start : start + length], [length])
                start += length
        if not counts.documents:
            skipped = f"{counts.empty_documents} empty, {counts.bad_records} bad"
            raise UserError(f"the input has no document with text ({skipped}): check --input and --field")
        builder.finalize(partial + ".idx")
    finally:
        builder.data_file.close()
    return counts, dtype.__name__


def _side_file(
    tokenizer: Tokenizer, counts: Counts, dtype: str, options: dict[str, Any], sources: Sequence[Source]
) -> dict[str, Any]:
    totals = asdict(counts)
    del totals["bad"]
    return {
        "format_version": FORMAT_VERSION,
        **totals,
        "dtype": dtype,
        "tokenizer": {
            "path": str(tokenizer.path),
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "options": options,
        "sources": [source.describe() for source in sources],
    }
