"""Raw text in: documents of text and JSONL files, gzipped or not, one at a time, with their place for errors."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ling.config.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")


class Record(NamedTuple):
    """One document as read: its raw bytes and the line (from 1) at which it starts."""

    line: int
    raw: bytes


class BadRecordError(ValueError):
    """A line that is no JSON object with a text in the wanted field."""


class HashingReader(io.RawIOBase):
    """A file's bytes, with their SHA-256 and number taken on the way past."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed in close)
        self._hash = hashlib.sha256()
        self.bytes_read = 0

    def readable(self) -> bool:
        """True, as io.RawIOBase wants to know."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the file; returns the number of bytes, 0 at the end."""
        count = self._file.readinto(buffer)
        self._hash.update(memoryview(buffer)[:count])
        self.bytes_read += count
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def hexdigest(self) -> str:
        """SHA-256 of the bytes read so far."""
        return self._hash.hexdigest()


@dataclass
class Source:
    """One input file and what was read of it so far; `sha256` is complete once `records` is exhausted."""

    path: Path
    bytes_read: int = 0
    sha256: str = ""

    def records(self, separator: str | None = None) -> Iterator[Record]:
        """Yield the file's records: a JSONL file's lines, a text file's documents.

        separator: a regular expression; a line of a text file that matches it as a whole ends a document and belongs to
        none. None: the file is one document. Raises UserError where the file cannot be read.
        """
        try:
            with HashingReader(self.path) as raw:
                stream = _decompressed(raw, self.path)  # held: the buffer closes `raw` when it goes
                for record in _split(stream, self.path, separator):
                    self.bytes_read = raw.bytes_read
                    yield record
                while raw.read(1 << 20):  # what the decompressor left belongs to the checksum
                    pass
                self.bytes_read, self.sha256 = raw.bytes_read, raw.hexdigest()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.path} is not a whole gzip file ({error}): fetch or compress it again") from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror or error})") from error

    def describe(self) -> dict[str, object]:
        """Path, size in bytes and SHA-256, for a side file."""
        return {"path": str(self.path), "bytes": self.bytes_read, "sha256": self.sha256}


def check_inputs(inputs: Sequence[Path]) -> int:
    """Refuse a missing, unreadable or foreign input before any work; returns their size in bytes together."""
    if not inputs:
        raise UserError("no input files: name at least one with --input")
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file; check the path given with --input")
        if path.is_dir():
            raise UserError(f"{path} is a folder: name its files, for example --input {path}/*.jsonl")
        if path.suffix in (".zst", ".parquet", ".bz2", ".xz", ".zip"):
            raise UserError(f"{path}: {path.suffix} is not read; give text or JSONL, plain or .gz")
    return sum(path.stat().st_size for path in inputs)


def check_separator(separator: str | None) -> None:
    """Refuse a document separator that is no regular expression."""
    try:
        re.compile(separator or "")
    except re.error as error:
        raise UserError(f"--document-separator {separator!r} is no regular expression ({error})") from error


def is_jsonl(path: Path) -> bool:
    """Whether the name says that each line is a JSON object."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix in JSONL_SUFFIXES


def record_text(record: Record, jsonl: bool, field: str) -> tuple[str, bool]:
    """The text of a record, and whether it had to be mended because it is not valid Unicode.

    Bytes that are no UTF-8 and lone surrogates become U+FFFD. Raises BadRecordError for a bad JSONL line.
    """
    try:
        text, mended = record.raw.decode("utf-8"), False
    except UnicodeDecodeError:
        text, mended = record.raw.decode("utf-8", errors="replace"), True
    if not jsonl:
        return text, mended
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadRecordError(f"a JSON {type(value).__name__} instead of an object")
    if not isinstance(value.get(field), str):
        found = ", ".join(map(str, list(value)[:6])) or "none"
        raise BadRecordError(f"no text in the field {field!r} (fields: {found})")
    text = value[field]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace"), True
    return text, mended


def iter_texts(sources: Sequence[Source], field: str) -> Iterator[str]:
    """The texts of all sources in order, bad JSONL lines raising UserError with file and line."""
    for source in sources:
        jsonl = is_jsonl(source.path)
        for record in source.records(separator=None if jsonl else ""):
            try:
                yield record_text(record, jsonl, field)[0]
            except BadRecordError as error:
                raise UserError(f"{source.path}:{record.line}: {error}") from error


def _decompressed(raw: HashingReader, path: Path) -> IO[bytes]:
    buffered = io.BufferedReader(raw, 1 << 20)
    return cast(IO[bytes], gzip.GzipFile(fileobj=buffered)) if path.suffix == ".gz" else buffered


def _split(stream: IO[bytes], path: Path, separator: str | None) -> Iterator[Record]:
    if is_jsonl(path):
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield Record(number, line)
        return
    if separator is None:
        yield Record(1, stream.read())
        return
    matches = re.compile(separator.encode("utf-8")).fullmatch
    lines: list[bytes] = []
    start = 1
    for number, line in enumerate(stream, 1):
        if matches(line.rstrip(b"\r\n")):
            if lines:
                yield Record(start, b"".join(lines).removesuffix(b"\n"))
            lines, start = [], number + 1
        else:
            lines.append(line)
    if lines:
        yield Record(start, b"".join(lines).removesuffix(b"\n"))
