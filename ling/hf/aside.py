"""Folders that appear complete or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ling.config.errors import UserError

SPARE_BYTES = 64 << 20


class ForeignRemainsError(UserError):
    """What an interruption has left does not belong to what is to be written now."""


def partial_of(out: Path) -> Path:
    """Where `out` is written before it is renamed."""
    return out.with_name(f".{out.name}.partial")


def check_room(out: Path, need: int) -> None:
    """Make `out`'s parent folder; UserError where `out` exists or the disk has less free than `need` bytes."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent} cannot be made ({error.strerror}); choose another folder") from None
    partial = partial_of(out)
    there = sum(path.stat().st_blocks * 512 for path in partial.rglob("*")) if partial.is_dir() else 0
    need += SPARE_BYTES - there
    free = shutil.disk_usage(out.parent).free
    if need > free:
        raise UserError(f"{out.parent} has {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB are needed; make room")


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which becomes `out` at the end. Wrong input removes it; an interruption leaves it.

    Raises:
        UserError: another process is writing it, or it cannot be written.
    """
    partial = partial_of(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{partial} cannot be made ({error.strerror}); choose another folder") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ForeignRemainsError(f"{partial} is being written by another process; wait for it") from None
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _flush(path)
        os.fsync(descriptor)
        if out.exists():
            raise ForeignRemainsError(f"{out} has appeared meanwhile; {partial} is complete: rename it yourself")
        partial.rename(out)
        _flush(out.parent)
    except OSError as error:
        raise UserError(f"{partial}: {error.strerror or error}; mend that and start again to go on") from error
    except ForeignRemainsError:
        raise
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
