"""Who writes which box of which tensor, and the threads that write them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ling.checkpoint.boxes import Box, Index
from ling.checkpoint.control import Control
from ling.checkpoint.folder import FileRecord, crc32_of
from ling.checkpoint.parts import Part
from ling.checkpoint.torch_dist import Item, Stored, TensorInfo, write_file

_ALIGNMENT = 64


class _Held(NamedTuple):
    """A part as other ranks need to know it."""

    key: str
    start: Index
    size: Index
    shape: Index
    dtype: torch.dtype

    @classmethod
    def of(cls, part: Part) -> _Held:
        return cls(part.key, part.start, part.box.size, part.shape, part.tensor.dtype)

    @property
    def bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


@dataclass
class Plan:
    """Which of its parts a rank writes; rank 0 knows all parts besides. It holds as long as the parts are the same."""

    mine: list[int]
    parts: dict[tuple[str, Index], _Held] = field(default_factory=dict)

    def tensors(self, stored: Sequence[Stored]) -> dict[str, TensorInfo]:
        """What was stored, tensor by tensor (rank 0)."""
        found: dict[str, TensorInfo] = {}
        for each in stored:
            if each.start is not None:
                held = self.parts[each.key, each.start]
                info = found.setdefault(each.key, TensorInfo(held.dtype, held.shape, []))
                info.chunks.append((Box(held.start, held.size), each))
        return found


def make_plan(parts: Sequence[Part], control: Control) -> Plan:
    """Share out the writing: each box is written once, by the one of its holders that has the least to write.

    Raises:
        RuntimeError: the parts of all ranks are not whole tensors.
    """
    by_rank = control.gather([_Held.of(part) for part in parts])
    known: dict[tuple[str, Index], _Held] = {}

    def assign() -> list[list[int]]:
        holders: dict[tuple[str, Index], list[tuple[int, int]]] = {}
        for rank, all_held in enumerate(by_rank):
            for index, held in enumerate(all_held):
                name = (held.key, held.start)
                if known.setdefault(name, held) != held:
                    raise RuntimeError(f"{held.key}: ranks hold boxes of different sizes at {held.start}")
                holders.setdefault(name, []).append((rank, index))
        _check_whole(known)
        load, shares = [0] * len(by_rank), [[] for _ in by_rank]  # type: ignore[var-annotated]
        # those without a choice first, then the large ones
        for name in sorted(holders, key=lambda name: (len(holders[name]) > 1, -known[name].bytes)):
            rank, index = min(holders[name], key=lambda holder: load[holder[0]])
            load[rank] += known[name].bytes
            shares[rank].append(index)
        return shares

    return Plan(control.share_out(assign), known)


def _check_whole(known: dict[tuple[str, Index], _Held]) -> None:
    covered: dict[str, int] = {}
    for held in known.values():
        covered[held.key] = covered.get(held.key, 0) + math.prod(held.size)
    for held in known.values():
        if covered[held.key] != math.prod(held.shape):
            raise RuntimeError(f"{held.key}: the ranks hold {covered[held.key]} of {math.prod(held.shape)} elements")


class Staging:
    """Memory of the CPU for a copy of what a rank writes; it stays allocated from one save to the next.

    Args:
        parts: to copy each time.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._ends, total = [], 0
        for part in parts:
            total = -(-total // _ALIGNMENT) * _ALIGNMENT + part.bytes
            self._ends.append(total)
        self._is_cuda = any(part.tensor.is_cuda for part in parts)
        self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=self._is_cuda)
        self._memory.fill_(0)  # has the pages made now, not while the run waits for its first save

    @torch.no_grad()
    def copy(self, parts: Sequence[Part]) -> list[Item]:
        """Copy the parts, and return the copies; they hold until the next call."""
        items = []
        for part, end in zip(parts, self._ends, strict=True):
            target = self._memory[end - part.bytes : end]
            items.append(Item(part.key, part.start, target.view(part.tensor.dtype).view(part.tensor.shape)))
            items[-1].value.copy_(part.tensor, non_blocking=True)
        if self._is_cuda:
            torch.cuda.synchronize()
        return items


def files_of(items: Sequence[Item], rank: int, count: int) -> dict[str, list[Item]]:
    """Share items out over so many files of about the same size, which are written at the same time."""
    shares: list[list[Item]] = [[] for _ in range(count)]
    load = [0] * count
    for item in sorted(items, key=_size, reverse=True):
        index = load.index(min(load))
        shares[index].append(item)
        load[index] += _size(item)
    return {f"__{rank}_{index}.distcp": share for index, share in enumerate(shares) if share}


def _size(item: Item) -> int:
    return item.value.numel() * item.value.element_size() if isinstance(item.value, torch.Tensor) else 0


@dataclass
class Written:
    """What a rank has written, or the first error."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    stored: list[Stored] = field(default_factory=list)
    error: str | None = None


class Job:
    """Writes files of items in threads of their own, one a file. They end with the process.

    Args:
        folder: exists; the files do not.
        files: items by file name.
        read_back: compare each file with its checksum once it is on disk.
    """

    def __init__(self, folder: Path, files: dict[str, list[Item]], read_back: bool) -> None:
        self._written = Written()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._write, args=(folder / name, items, read_back), daemon=True)
            for name, items in files.items()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_done(self) -> bool:
        """Whether all threads have ended."""
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self) -> Written:
        """Wait for the threads."""
        for thread in self._threads:
            thread.join()
        return self._written

    def _write(self, path: Path, items: list[Item], read_back: bool) -> None:
        try:
            record, stored = write_file(path, items)
            if read_back and _read_back(path) != record.crc32:
                raise OSError(f"{path.name} reads back other than it was written")
            with self._lock:
                self._written.files[path.name] = record
                self._written.stored += stored
        except BaseException as error:  # the thread's only way to tell
            with self._lock:
                self._written.error = self._written.error or f"{type(error).__name__}: {_text(error)}"


def _read_back(path: Path) -> str:
    """A file's checksum as the disk has it, not the system's memory of what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return crc32_of(path)


def _text(error: Any) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
