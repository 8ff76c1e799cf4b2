"""The folder `.NAME.partial` in which a preparation grows, with a journal from which an interrupted one goes on.

tokens.bin and documents.bin hold what was encoded so far, skipped.txt the bad records. The journal has a line for each
input that is complete, with the sizes of these files at its end; what lies beyond is cut off on resume. Outputs are
made here too, and moved into place when all of them are whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ling.config.errors import UserError
from ling.data.inputs import Input

DOCUMENT = np.dtype([("tokens", "<i4"), ("bytes", "<i4")])
HASHED_DOCUMENT = np.dtype([("tokens", "<i4"), ("bytes", "<i4"), ("digest", "<u8", (2,))])
TOKENS, DOCUMENTS, SKIPPED = "tokens.bin", "documents.bin", "skipped.txt"
SETTINGS, JOURNAL, COMPLETE, LOCK = "settings.json", "journal.jsonl", "complete.json", "lock"
SYNC_SECONDS = 5.0
BAD_RECORDS_SHOWN = 10


@dataclass
class Counts:
    """Totals of a preparation, or a part of one; `bad` holds the first bad records as `file:line: reason`."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty_documents: int = 0
    mended_documents: int = 0
    bad_records: int = 0
    duplicate_documents: int = 0
    bad: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Count another part."""
        for name, value in asdict(other).items():
            if name == "bad":
                self.bad += value[: BAD_RECORDS_SHOWN - len(self.bad)]
            else:
                setattr(self, name, getattr(self, name) + value)


class Spool:
    """An unfinished preparation. Use it with `with`: one process at a time has it.

    On leaving, a spool in which no input is complete is removed; others stay for the next start.
    Raises UserError where another process has it, or where it was begun with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any], document_type: np.dtype[Any]) -> None:
        self.folder = output.with_name(f".{output.name}.partial")
        self.document_type = document_type
        self._settings = {**settings, "deduplicate or split": document_type == HASHED_DOCUMENT}
        self._entries: list[dict[str, Any]] = []
        self._unsynced: list[dict[str, Any]] = []
        self._files: dict[str, IO[bytes]] = {}
        self._last_sync = time.monotonic()

    def __enter__(self) -> Spool:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / LOCK, "wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(f"{self.folder} is in use: another process is preparing this output") from error
        except OSError:  # a file system without locks
            pass
        try:
            self._check_settings()
        except UserError:
            self._lock.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            if self._files:
                self._sync()
                for file in self._files.values():
                    file.close()
            if not self._size(JOURNAL) and not self.is_complete():
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            self._lock.close()

    def _check_settings(self) -> None:
        path = self.folder / SETTINGS
        known = _read_json(path)
        if known is None:
            _write_json(path, self._settings)
        elif known != self._settings:
            different = ", ".join(key for key, value in self._settings.items() if known.get(key) != value)
            raise UserError(
                f"{self.folder} holds an unfinished preparation with other settings ({different}): finish it with "
                "those, or remove the folder to start anew"
            )

    def resume(self, inputs: Sequence[Input], accept_bad: bool) -> int:
        """How many of the inputs are complete already: as many from the first on as the journal has, unchanged.

        accept_bad: whether inputs with skipped records count. The rest of the spool is cut off.
        """
        journal = self.folder / JOURNAL
        lines = journal.read_bytes().splitlines() if journal.exists() else []
        entries = [entry for entry in map(_parse, lines) if entry is not None]
        for entry, source in zip(entries, inputs, strict=False):
            whole = all(self._size(name) >= size for name, size in entry["sizes"].items())
            same = not source.is_stdin and (entry["path"], entry["stat"]) == (str(source.path), _stat(source))
            if not (same and whole) or (entry["counts"]["bad_records"] and not accept_bad):
                break
            source.bytes_read, source.sha256 = entry["bytes"], entry["sha256"]
            self._entries.append(entry)
        sizes = self._entries[-1]["sizes"] if self._entries else dict.fromkeys((TOKENS, DOCUMENTS, SKIPPED), 0)
        journal.write_bytes(b"".join(map(_line, self._entries)))
        for name in (TOKENS, DOCUMENTS, SKIPPED):
            self._files[name] = open(self.folder / name, "ab")  # noqa: SIM115 (closed in __exit__)
            self._files[name].truncate(sizes[name])
        self._files[JOURNAL] = open(journal, "ab")  # noqa: SIM115
        return len(self._entries)

    def append(self, tokens: bytes, documents: bytes, bad: Sequence[str]) -> None:
        """Add encoded documents: their tokens, and their entries of `document_type`."""
        self._files[TOKENS].write(tokens)
        self._files[DOCUMENTS].write(documents)
        self._files[SKIPPED].write("".join(f"{line}\n" for line in bad).encode("utf-8", "surrogateescape"))

    def end_input(self, source: Input, counts: Counts) -> None:
        """Note that an input is complete."""
        sizes = {name: self._files[name].tell() for name in (TOKENS, DOCUMENTS, SKIPPED)}
        stat = None if source.is_stdin else _stat(source)
        self._unsynced.append({**source.describe(), "stat": stat, "sizes": sizes, "counts": asdict(counts)})
        if time.monotonic() - self._last_sync > SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        """Bring the data to the disk, then the journal's lines that tell of them."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        if self._unsynced:
            self._files[JOURNAL].write(b"".join(map(_line, self._unsynced)))
            self._files[JOURNAL].flush()
            os.fsync(self._files[JOURNAL].fileno())
        self._entries += self._unsynced
        self._unsynced = []
        self._last_sync = time.monotonic()

    def finish(self) -> tuple[list[dict[str, Any]], Counts]:
        """All inputs are read: what to say of each (path, bytes, sha256), and the totals."""
        self._sync()
        counts = Counts()
        for entry in self._entries:
            counts.add(Counts(**entry["counts"]))
        return [{key: entry[key] for key in ("path", "bytes", "sha256")} for entry in self._entries], counts

    def discard(self) -> None:
        """Forget all of it: on leaving, the spool is removed."""
        os.truncate(self.folder / JOURNAL, 0)

    def documents(self) -> np.ndarray:
        """The documents so far, memory-mapped: `document_type` [N]."""
        path = self.folder / DOCUMENTS
        if not path.stat().st_size:
            return np.empty(0, self.document_type)
        return np.memmap(path, dtype=self.document_type, mode="r")

    def is_complete(self) -> bool:
        """Whether the outputs are whole and only have to be moved into place."""
        return (self.folder / COMPLETE).exists()

    def publish(self, moves: dict[str, str] | None = None, counts: Counts | None = None) -> Counts:
        """Move the outputs into place, in this order, and remove the spool; returns the counts.

        moves: name in the spool -> final path. Without it, an interrupted move goes on.
        """
        if moves is not None and counts is not None:
            for name in moves:
                with open(self.folder / name, "rb") as file:
                    os.fsync(file.fileno())
            _write_json(self.folder / COMPLETE, {"moves": moves, "counts": asdict(counts)})
        noted = _read_json(self.folder / COMPLETE) or {}
        for name, final in noted["moves"].items():
            if (self.folder / name).exists():
                os.replace(self.folder / name, final)
        shutil.rmtree(self.folder)
        return Counts(**noted["counts"])

    def _size(self, name: str) -> int:
        path = self.folder / name
        return path.stat().st_size if path.exists() else 0


def _stat(source: Input) -> list[int]:
    found = source.path.stat()
    return [found.st_size, found.st_mtime_ns]


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # the last line of a process that was killed while it wrote
        return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove the folder {path.parent} to start anew") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".new")
    with open(partial, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
