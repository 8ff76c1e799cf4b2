"""Raw input: files, folders, globs and standard input, read in blocks of whole records, whatever they are packed in."""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import io
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ling.config.errors import UserError

FORMATS = ("jsonl", "text", "parquet")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text", ".parquet": "parquet"}
IN_FOLDERS = tuple(suffix for suffix in SUFFIXES if suffix != ".json")  # which are side files and settings there
COMPRESSIONS = (".gz", ".zst")
NOT_READ = (".bz2", ".xz", ".zip", ".tar", ".7z")
STDIN = "-"
BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 1 << 28


class Block(NamedTuple):
    """Some neighbouring records of one input: a JSONL file's lines as they stand, or documents one after the other."""

    path: str
    line: int  # of the first record, from 1 (a row, in Parquet)
    payload: bytes
    documents: list[tuple[int, int]] | None  # line and bytes of each; None: the payload is JSONL lines
    bad: list[str]  # records that could not be read at all, as `file:line: reason`


class HashingReader(io.RawIOBase):
    """A stream's bytes, with their SHA-256 and number taken on the way past."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._file = stream
        self._hash = hashlib.sha256()
        self.bytes_read = 0

    def readable(self) -> bool:
        """True, as io.RawIOBase wants to know."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the stream; returns the number of bytes, 0 at the end."""
        count = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._hash.update(memoryview(buffer)[:count])
        self.bytes_read += count
        return count

    def close(self) -> None:
        """Close the stream."""
        self._file.close()
        super().close()

    def hexdigest(self) -> str:
        """SHA-256 of the bytes read so far."""
        return self._hash.hexdigest()


@dataclass
class Input:
    """One input and what was read of it so far; `sha256` is complete once `blocks` is exhausted."""

    path: Path
    format: str
    bytes_read: int = 0
    sha256: str = ""

    @property
    def is_stdin(self) -> bool:
        """Whether this is standard input, which can be read only once."""
        return str(self.path) == STDIN

    def blocks(self, field: str, separator: str | None = None) -> Iterator[Block]:
        """Yield the records in blocks of about a mebibyte.

        field: the column of a Parquet file. separator: a regular expression; a line of a text file that matches it as a
        whole ends a document and belongs to none. None: the file is one document. A record longer than 256 MiB is bad.
        Raises UserError where the input cannot be read.
        """
        try:
            with HashingReader(sys.stdin.buffer if self.is_stdin else open(self.path, "rb", buffering=0)) as raw:
                if self.format == "parquet":
                    yield from self._count(_parquet_blocks(self.path, field), raw)
                else:
                    stream = _decompressed(raw, self.path)  # held: the buffer closes `raw` when it goes
                    records = (
                        _jsonl_blocks(stream, str(self.path))
                        if self.format == "jsonl"
                        else _text_blocks(stream, str(self.path), separator)
                    )
                    yield from self._count(records, raw)
                while raw.read(1 << 20):  # what no reader took belongs to the checksum
                    pass
                self.bytes_read, self.sha256 = raw.bytes_read, raw.hexdigest()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.path} is not a whole gzip file ({error}): fetch or compress it again") from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror or error})") from error

    def _count(self, blocks: Iterator[Block], raw: HashingReader) -> Iterator[Block]:
        for block in blocks:
            self.bytes_read = raw.bytes_read
            yield block

    def describe(self) -> dict[str, object]:
        """Path, size in bytes and SHA-256, for a side file."""
        return {"path": str(self.path), "bytes": self.bytes_read, "sha256": self.sha256}


def find_inputs(names: Sequence[str | Path], format: str = "auto") -> list[Input]:
    """The inputs that the names stand for, in their order: files, folders (their data files, sorted), globs (sorted),
    and `-` for standard input.

    format: of every input; auto: by the name, standard input as JSONL. Raises UserError for what is missing, foreign,
    empty-handed or named twice.
    """
    if format != "auto" and format not in FORMATS:
        raise UserError(f"--format {format}: choose one of auto, {', '.join(FORMATS)}")
    if not names:
        raise UserError("no input files: name at least one with --input")
    paths = [path for name in names for path in _paths(Path(name), format)]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"{twice} is named twice by --input: name it once")
    return [Input(path, _format(path) if format == "auto" else format) for path in paths]


def check_separator(separator: str | None) -> None:
    """Refuse a document separator that is no regular expression."""
    try:
        re.compile(separator or "")
    except re.error as error:
        raise UserError(f"--document-separator {separator!r} is no regular expression ({error})") from error


def _paths(path: Path, format: str) -> list[Path]:
    if str(path) == STDIN:
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if _is_data(file.relative_to(path)) and file.is_file()]
        if not found:
            known = ", ".join(IN_FOLDERS)
            raise UserError(f"{path} is a folder: name its files, for example '{path}/*.md'; none of them is {known}")
        return found
    if not path.exists() and glob.has_magic(str(path)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise UserError(f"{path}: no file matches; check the pattern given with --input")
        return found
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path given with --input")
    if path.suffix in NOT_READ and format == "auto":
        raise UserError(f"{path}: {path.suffix} is not read; give text, JSONL (plain, .gz or .zst) or .parquet")
    return [path]


def _is_data(path: Path) -> bool:
    """Whether a file of a folder is read: by the suffix, and not hidden."""
    return _bare(path).suffix in IN_FOLDERS and not any(part.startswith(".") for part in path.parts)


def _bare(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in COMPRESSIONS else path


def _format(path: Path) -> str:
    return "jsonl" if str(path) == STDIN else SUFFIXES.get(_bare(path).suffix, "text")


def _decompressed(raw: HashingReader, path: Path) -> IO[bytes]:
    buffered = io.BufferedReader(raw, 1 << 20)
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=buffered))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(buffered, path), 1 << 20)
    return buffered


class _ZstdReader(io.RawIOBase):
    """The content of a Zstandard stream of any number of frames."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream, self._path = stream, path
        self._package = _optional("zstandard", path)
        self._frame: Any = None  # the decompressor of the frame that is open
        self._compressed = self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._compressed = self._compressed or self._stream.read(1 << 14)
            if not self._compressed:
                if self._frame is not None:
                    raise self._broken("it ends too early")
                return 0
            self._frame = self._frame or self._package.ZstdDecompressor().decompressobj()
            try:
                self._content = self._frame.decompress(self._compressed)
            except self._package.ZstdError as error:
                raise self._broken(str(error)) from error
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _broken(self, reason: str) -> UserError:
        return UserError(f"{self._path} is not a whole zstd file ({reason}): fetch or compress it again")


def _optional(package: str, path: Path) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.split(".")[0]
        raise UserError(f"{path} needs the package `{name}`: pip install {name}") from error


def _jsonl_blocks(stream: IO[bytes], path: str) -> Iterator[Block]:
    line = 1
    while data := stream.read(BLOCK_BYTES):
        rest = b"" if data.endswith(b"\n") else stream.readline(MAX_RECORD_BYTES)
        if len(rest) == MAX_RECORD_BYTES and not rest.endswith(b"\n"):
            cut = data.rfind(b"\n") + 1
            bad_line = line + data.count(b"\n")
            yield Block(path, line, data[:cut], None, [_too_long(path, bad_line)])
            while (skipped := stream.readline(MAX_RECORD_BYTES)) and not skipped.endswith(b"\n"):
                pass
            line = bad_line + 1
            continue
        payload = data + rest
        yield Block(path, line, payload, None, [])
        line += payload.count(b"\n")


def _text_blocks(stream: IO[bytes], path: str, separator: str | None) -> Iterator[Block]:
    if separator is None:
        text = stream.read(MAX_RECORD_BYTES + 1)
        if len(text) > MAX_RECORD_BYTES:
            yield Block(path, 1, b"", [], [_too_long(path, 1) + "; give --document-separator"])
        else:
            yield Block(path, 1, text, [(1, len(text))], [])
        return
    yield from _gather(path, _documents(stream, re.compile(separator.encode("utf-8"))))


def _documents(stream: IO[bytes], separator: re.Pattern[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """First line and bytes of each document; None for those too long."""
    lines: list[bytes] = []
    number = size = 0
    start = 1
    while line := stream.readline(MAX_RECORD_BYTES):
        number += 1
        if separator.fullmatch(line.rstrip(b"\r\n")):
            if size:
                yield start, _joined(lines, size)
            lines, start, size = [], number + 1, 0
            continue
        size += len(line)
        if size <= MAX_RECORD_BYTES:
            lines.append(line)
        else:
            lines.clear()
    if size:
        yield start, _joined(lines, size)


def _joined(lines: list[bytes], size: int) -> bytes | None:
    return None if size > MAX_RECORD_BYTES else b"".join(lines).removesuffix(b"\n")


def _parquet_blocks(path: Path, field: str) -> Iterator[Block]:
    pyarrow, parquet = _optional("pyarrow", path), _optional("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise UserError(f"{path}: no column {field!r} (columns: {', '.join(file.schema_arrow.names[:6])})")
        kind = file.schema_arrow.field(field).type
        if not any(test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string)):
            raise UserError(f"{path}: the column {field!r} holds {kind} and no text")
        yield from _gather(str(path), _rows(file, field), "no text in the row")
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable Parquet file ({str(error).splitlines()[0]})") from error


def _rows(file: Any, field: str) -> Iterator[tuple[int, bytes | None]]:
    number = 0
    for batch in file.iter_batches(batch_size=256, columns=[field]):
        for value in batch.column(0):
            number += 1
            yield number, None if not value.is_valid else bytes(value.as_buffer())


def _gather(path: str, records: Iterator[tuple[int, bytes | None]], missing: str | None = None) -> Iterator[Block]:
    """Records in blocks of about BLOCK_BYTES."""
    texts: list[bytes] = []
    places: list[tuple[int, int]] = []
    bad: list[str] = []
    size = 0
    for line, text in records:
        if text is None:
            bad.append(f"{path}:{line}: {missing}" if missing else _too_long(path, line))
            continue
        texts.append(text)
        places.append((line, len(text)))
        size += len(text)
        if size >= BLOCK_BYTES:
            yield Block(path, places[0][0], b"".join(texts), places, bad)
            texts, places, bad, size = [], [], [], 0
    if places or bad:
        yield Block(path, places[0][0] if places else 1, b"".join(texts), places, bad)


def _too_long(path: str, line: int) -> str:
    return f"{path}:{line}: longer than {MAX_RECORD_BYTES >> 20} MiB"
