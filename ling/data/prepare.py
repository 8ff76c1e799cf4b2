"""Text in, tokens out: Megatron's indexed format, one document per record, each with its end token.

The files' bytes depend on the input, the tokenizer and the options, never on the number of worker processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import lru_cache
from hashlib import blake2b
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from ling.config.errors import UserError
from ling.data.assemble import Part, choose, route, write_index
from ling.data.inputs import Block, Input, check_separator, find_inputs
from ling.data.records import BadRecordError, record_text, records_of
from ling.data.spool import DOCUMENT, HASHED_DOCUMENT, SKIPPED, TOKENS, Counts, Spool
from ling.data.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
QUEUE_PER_WORKER = 4  # blocks in flight; bounds the memory
ON_ERROR = ("stop", "skip")
SMALL_VOCABULARY = 65536  # ids below it fit uint16
MAIN_SPLIT = "train"


class Task(NamedTuple):
    """A block on its way to a worker."""

    tokenizer: str
    block: Block
    field: str
    hashed: bool


class Encoded(NamedTuple):
    """What a worker makes of a block: the documents' tokens one after the other, and what was met on the way."""

    tokens: bytes
    documents: bytes
    counts: Counts
    bad: list[str]


class Options(NamedTuple):
    """What a preparation does; see `prepare`."""

    field: str
    separator: str | None
    input_format: str
    on_error: str
    deduplicate: bool
    split: dict[str, float]
    split_seed: int

    def check(self, workers: int) -> None:
        """Raise UserError for values that cannot be."""
        check_separator(self.separator)
        if workers < 1:
            raise UserError(f"--workers {workers}: give 1 or more")
        if self.on_error not in ON_ERROR:
            raise UserError(f"--on-error {self.on_error}: choose one of {', '.join(ON_ERROR)}")
        for name, share in self.split.items():
            if not re.fullmatch(r"\w+", name) or name == MAIN_SPLIT:
                raise UserError(f"--split {name}: give a name such as valid (what is left becomes {MAIN_SPLIT})")
            if not 0 < share < 1:
                raise UserError(f"--split {name}={share:g}: give a share of the documents between 0 and 1")
        if sum(self.split.values()) >= 1:
            raise UserError(f"--split: the shares add up to {sum(self.split.values()):g}: leave some for {MAIN_SPLIT}")
        if not 0 <= self.split_seed < 2**64:
            raise UserError(f"--split-seed {self.split_seed}: give a number from 0 to 2^64 - 1")

    @property
    def hashed(self) -> bool:
        """Whether the documents' hashes are needed."""
        return self.deduplicate or bool(self.split)


class Progress:
    """A line on `stream` with the share done, the rate and the time left; silent for work that takes seconds."""

    def __init__(self, total_bytes: int, stream: TextIO | None, done_bytes: int = 0) -> None:
        self._total, self._stream, self._before = total_bytes, stream, done_bytes
        self._start = self._last = time.monotonic()
        self._shown = False

    def update(self, done_bytes: int, tokens: int) -> None:
        """Show the state, at most every two seconds (every ten where the stream is no terminal)."""
        now = time.monotonic()
        if self._stream is None or now - self._last < (2 if self._stream.isatty() else 10):
            return
        self._last, self._shown = now, True
        seconds = now - self._start
        rate = f"{tokens / seconds:,.0f} tokens/s"
        if self._total:
            new, left = done_bytes - self._before, max(self._total - done_bytes, 0)
            eta = f"{seconds * left / new:.0f} s left" if new else "time left unknown"
            line = f"{min(done_bytes / self._total, 1):6.1%} of {self._total / 2**20:.1f} MiB, {rate}, {eta}"
        else:
            line = f"{done_bytes / 2**20:.1f} MiB, {rate}"
        self._stream.write(f"\r{line}   " if self._stream.isatty() else f"{line}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line."""
        if self._shown and self._stream is not None and self._stream.isatty():
            self._stream.write("\n")


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    field: str = "text",
    separator: str | None = None,
    input_format: str = "auto",
    on_error: str = "stop",
    deduplicate: bool = False,
    split: Mapping[str, float] | None = None,
    split_seed: int = 0,
    workers: int = 1,
    progress: TextIO | None = None,
) -> Counts:
    """Write `output`.bin, .idx and .json (the side file) from raw text, in the order of the inputs.

    inputs, input_format: see `find_inputs`. field: where JSONL and Parquet hold the text. separator: see
    `Input.blocks`. on_error: what a bad record does; skipped ones are listed in `output`.skipped.txt. deduplicate:
    keep the first of documents with the same text. split: shares of further outputs by name, such as {"valid": 0.01}:
    `output`_valid and so on, and `output`_train for what is left, chosen by a hash of the text and split_seed.
    workers: processes that tokenize. progress: where to show it.

    An interrupted preparation goes on behind the last input that was complete. Raises UserError for bad input or an
    output that exists. The indices appear last, so a prefix that has one is complete.
    """
    options = Options(field, separator, input_format, on_error, deduplicate, dict(split or {}), split_seed)
    options.check(workers)
    sources = find_inputs(inputs, input_format)
    tokenizer = load_tokenizer(tokenizer_path)
    final = Path(output)
    prefixes = [f"{final}_{name}" for name in (MAIN_SPLIT, *options.split)] if options.split else [str(final)]
    settings = {"tokenizer": tokenizer.fingerprint, "field": field, "separator": separator, "format": input_format}
    try:
        with Spool(final, settings, HASHED_DOCUMENT if options.hashed else DOCUMENT) as spool:
            if spool.is_complete():
                return spool.publish()
            _refuse_existing(final, prefixes)
            _encode_into(spool, sources, str(tokenizer_path), tokenizer, options, workers, progress)
            return _finish(spool, final, prefixes, tokenizer, options)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error})") from error


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type in which token ids are stored: uint16 where they fit, else int32."""
    return np.dtype(np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32)


def _refuse_existing(final: Path, prefixes: Sequence[str]) -> None:
    for path in [f"{prefix}{suffix}" for prefix in prefixes for suffix in (".bin", ".idx", ".json")] + [
        f"{final}.skipped.txt"
    ]:
        if Path(path).exists():
            raise UserError(f"{path} exists already: choose another --output, or remove it")


def _encode_into(
    spool: Spool,
    sources: Sequence[Input],
    tokenizer_path: str,
    tokenizer: Tokenizer,
    options: Options,
    workers: int,
    progress: TextIO | None,
) -> None:
    """Encode what the spool does not have yet."""
    done = spool.resume(sources, accept_bad=options.on_error == "skip")
    total = 0 if any(source.is_stdin for source in sources) else sum(source.path.stat().st_size for source in sources)
    read_before = sum(source.bytes_read for source in sources[:done])
    if done and progress is not None:
        progress.write(f"going on behind {done} of {len(sources)} inputs that are complete\n")
    line = Progress(total, progress, read_before)
    tasks = (
        (number, Task(tokenizer_path, block, options.field, options.hashed))
        for number, source in enumerate(sources[done:], done)
        for block in source.blocks(options.field, options.separator)
    )
    counts, tokens = Counts(), 0
    with contextlib.closing(_encode_all(tasks, tokenizer, workers)) as encoded:
        for number, part in encoded:
            while done < number:
                spool.end_input(sources[done], counts)
                read_before += sources[done].bytes_read
                done, counts = done + 1, Counts()
            if part.bad and options.on_error == "stop":
                raise UserError(f"{part.bad[0]}; mend the record, or leave such ones out with --on-error skip")
            spool.append(part.tokens, part.documents, part.bad)
            counts.add(part.counts)
            tokens += part.counts.tokens
            line.update(read_before + sources[number].bytes_read, tokens)
    for source in sources[done:]:
        spool.end_input(source, counts)
        counts = Counts()
    line.close()


def _encode_all(
    tasks: Iterable[tuple[int, Task]], tokenizer: Tokenizer, workers: int
) -> Generator[tuple[int, Encoded], None, None]:
    """The encoded blocks in order, each with the number of its input, with a bounded number of them in flight."""
    if workers == 1:
        for number, task in tasks:
            yield number, _encode(task, tokenizer)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker) as pool:
        pending: deque[tuple[int, Future[Encoded]]] = deque()
        try:
            for number, task in tasks:
                pending.append((number, pool.submit(_encode, task)))
                if len(pending) >= QUEUE_PER_WORKER * workers:
                    yield pending[0][0], pending.popleft()[1].result()
            while pending:
                yield pending[0][0], pending.popleft()[1].result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed (perhaps for memory): start again, which goes on where this stopped, "
                "with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave an interrupt at the terminal to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # Hugging Face's threads: the processes have the cores
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode(task: Task, tokenizer: Tokenizer | None = None) -> Encoded:
    tokenizer = tokenizer or _cached_tokenizer(task.tokenizer)
    block = task.block
    texts: list[str] = []
    counts = Counts()
    bad = list(block.bad)
    for record in records_of(block):
        try:
            text, was_mended = record_text(record, block.documents is None, task.field)
        except BadRecordError as error:
            bad.append(f"{block.path}:{record.line}: {error}")
            continue
        if not text or text.isspace():
            counts.empty_documents += 1
            continue
        counts.mended_documents += was_mended
        texts.append(text)
    end = np.array([tokenizer.eos_id], dtype=np.int32)
    encoded = tokenizer.encode_batch(texts)
    documents = np.zeros(len(texts), HASHED_DOCUMENT if task.hashed else DOCUMENT)
    documents["tokens"] = [len(ids) + 1 for ids in encoded]
    raw = [text.encode("utf-8") for text in texts]
    documents["bytes"] = [len(text) for text in raw]
    if task.hashed:
        digests = b"".join(blake2b(text, digest_size=16).digest() for text in raw)
        documents["digest"] = np.frombuffer(digests, "<u8").reshape(-1, 2)
    tokens = np.concatenate([part for ids in encoded for part in (ids, end)]) if encoded else end[:0]
    counts.documents, counts.tokens = len(texts), len(tokens)
    counts.bytes = int(documents["bytes"].sum(dtype=np.int64))
    counts.bad_records = len(bad)
    counts.add(Counts(bad=bad))
    return Encoded(tokens.astype(token_dtype(tokenizer.vocab_size)).tobytes(), documents.tobytes(), counts, bad)


@lru_cache(maxsize=1)
def _cached_tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path)


def _finish(spool: Spool, final: Path, prefixes: Sequence[str], tokenizer: Tokenizer, options: Options) -> Counts:
    """Make the outputs in the spool and move them into place."""
    described, counts = spool.finish()
    if not counts.documents:
        skipped = f"{counts.empty_documents} empty, {counts.bad_records} bad"
        spool.discard()
        raise UserError(f"the input has no document with text ({skipped}): check --input and --field")
    dtype, documents, folder = token_dtype(tokenizer.vocab_size), spool.documents(), spool.folder
    names = [MAIN_SPLIT, *options.split] if options.split else ["all"]
    if options.hashed:
        tokens = np.memmap(folder / TOKENS, dtype=dtype, mode="r")
        shares = list(options.split.values())
        target, dropped = choose(documents, folder, options.deduplicate, shares, options.split_seed)
        parts = route(tokens, documents, target, folder, names)
        counts.duplicate_documents = dropped
        binaries = [f"{name}.bin" for name in names]
    else:
        write_index(folder / "all.idx", documents["tokens"], dtype)
        parts, binaries = [Part(counts.documents, counts.tokens, counts.bytes)], [TOKENS]
    for name, part in zip(names, parts, strict=True):
        if not part.documents:
            raise UserError(
                f"--split: {name} got none of the {counts.documents} documents: give it a larger share, another "
                "--split-seed, or more input"
            )
        side = _side_file(tokenizer, counts, part, dtype, options, described, name)
        (folder / f"{name}.json").write_text(json.dumps(side, indent=2) + "\n")
    counts.documents, counts.tokens, counts.bytes = (
        sum(getattr(part, key) for part in parts) for key in ("documents", "tokens", "bytes")
    )
    moves = {SKIPPED: f"{final}.skipped.txt"} if counts.bad_records else {}
    moves |= {f"{name}.json": f"{prefix}.json" for name, prefix in zip(names, prefixes, strict=True)}
    moves |= {binary: f"{prefix}.bin" for binary, prefix in zip(binaries, prefixes, strict=True)}
    moves |= {f"{name}.idx": f"{prefix}.idx" for name, prefix in zip(names, prefixes, strict=True)}
    return spool.publish(moves, counts)


def _side_file(
    tokenizer: Tokenizer,
    counts: Counts,
    part: Part,
    dtype: np.dtype[Any],
    options: Options,
    described: list[dict[str, Any]],
    name: str,
) -> dict[str, Any]:
    totals = {**asdict(counts), **asdict(part)}
    del totals["bad"]
    return {
        "format_version": FORMAT_VERSION,
        **totals,
        "dtype": dtype.name,
        "tokenizer": {
            "path": str(tokenizer.path),
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "options": {
            "field": options.field,
            "document_separator": options.separator,
            "format": options.input_format,
            "on_error": options.on_error,
            "deduplicate": options.deduplicate,
            "split": {"name": name, "shares": options.split, "seed": options.split_seed} if options.split else None,
        },
        "sources": described,
    }
