"""A run's `metrics.jsonl`: one JSON object per line, append-only, each with the `attempt` that wrote it.

An attempt is one start of the run. On resume, the lines past the checkpoint move to `metrics.superseded.jsonl`, so
that `metrics.jsonl` tells one story and nothing is lost. A number that JSON does not have is written as "nan", "inf" or
"-inf".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
SUPERSEDED = "metrics.superseded.jsonl"
_NON_FINITE = ("nan", "inf", "-inf")


class MetricsFile:
    """An open `metrics.jsonl`; made by `open_metrics`."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path = path
        self.attempt = attempt
        self._torn = False
        # unbuffered: one write call per line, in the file when `write` returns
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record, with its `attempt`. An OSError (a full disk) leaves the file usable for the next record."""
        line = (b"\n" if self._torn else b"") + _encode({**record, "attempt": self.attempt})
        self._torn = True
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: a line was written in part only")
        self._torn = False

    def close(self) -> None:
        """Close the file; it can be called twice."""
        self._file.close()


def open_metrics(run_dir: Path, resume_step: int) -> MetricsFile:
    """Open the run's metrics for a new attempt that continues after `resume_step` (0: from the start).

    Lines of later steps, and a half line that a crash has left, move to `metrics.superseded.jsonl`. It can be
    interrupted anywhere and called again: a line is in the second file before it leaves the first, and never twice.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path, superseded = run_dir / METRICS, run_dir / SUPERSEDED
    kept: list[bytes] = []
    moved: list[bytes] = []
    attempt = 0
    content = path.read_bytes() if path.exists() else b""
    for line in filter(None, content.split(b"\n")):
        record = _decode(line)
        if record is None:
            moved.append(_encode({"torn": line.decode(errors="replace")}))
            continue
        attempt = max(attempt, _attempt(record))
        step = record.get("step")
        past = isinstance(step, (int, float)) and step > resume_step
        (moved if past else kept).append(line + b"\n")
    old = _whole_lines(superseded)
    attempt = max([attempt, *(_attempt(_decode(line) or {}) for line in old)])
    known = set(old)
    _append(superseded, [line for line in moved if line not in known])
    if b"".join(kept) != content:
        _replace(path, kept)
    return MetricsFile(path, attempt + 1)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run in order, non-finite numbers as floats; half lines are left out, no file is no record."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    records = (_decode(line) for line in path.read_bytes().split(b"\n") if line)
    return [_restore(record) for record in records if record is not None]


def plain(value: Any) -> Any:
    """`value` as JSON has it: tensors and arrays as numbers or lists, non-finite floats as strings."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def _encode(record: Mapping[str, Any]) -> bytes:
    return json.dumps(plain(record), allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not even text
        return None
    return record if isinstance(record, dict) else None


def _restore(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restore(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return float(value) if isinstance(value, str) and value in _NON_FINITE else value


def _attempt(record: Mapping[str, Any]) -> int:
    attempt = record.get("attempt", 0)
    return attempt if isinstance(attempt, int) else 0


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, cut back to its last newline: a crash while lines were moved leaves a half one.

    That line is still whole in the file that it was moved from.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    return whole.splitlines(keepends=True)


def _append(path: Path, lines: Iterable[bytes]) -> None:
    content = b"".join(lines)
    if content:
        with path.open("ab") as file:
            _write_through(file, content)
        _sync_folder(path.parent)


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        _write_through(file, b"".join(lines))
    aside.replace(path)
    _sync_folder(path.parent)


def _write_through(file: Any, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
