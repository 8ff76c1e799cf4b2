"""Memory-mapped files that hold no descriptor open, unlike `np.memmap`'s.

A run may have thousands of sources with several files each, and most systems allow a process 1,024 open files.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: str | Path) -> np.ndarray:
    """All bytes of a file, read-only: uint8 [size]. Views of it keep the mapping. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            return np.empty(0, np.uint8)
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    region = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(region, _LIBC.munmap, address, size).atexit = False  # the system does that, when nobody reads
    mapped = np.frombuffer(memoryview(region), np.uint8)
    mapped.flags.writeable = False
    return mapped


def part_of(mapped: np.ndarray, dtype: Any, count: int, offset: int = 0) -> np.ndarray:
    """So many numbers of a mapped file, from a byte on: dtype [count]."""
    return mapped[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)
