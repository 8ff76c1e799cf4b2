"""Small files in a run's `job/` folder, written so that a reader or a crash never meets half of one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


def job_folder(run_dir: Path) -> Path:
    """Where a run keeps what concerns its job."""
    return run_dir / "job"


def node_name() -> str:
    """Name of this machine as the scheduler calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@cache
def machine_id() -> str:
    """Tells apart machines, their boots, and containers with process numbers of their own."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file, or no object in it."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object to a file, in place of what was there."""
    aside = _aside(path, value)
    aside.replace(path)


def create_json(path: Path, value: Mapping[str, Any]) -> bool:
    """Write an object to a file unless there is one already; whether it was written. Of several at once one succeeds,
    on network file systems too (a hard link is made or not made)."""
    aside = _aside(path, value)
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)
    return True


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _aside(path: Path, value: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{node_name()}.{os.getpid()}.partial")
    with aside.open("w") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return aside
