"""Work on a large model in bounded memory: slabs of tensors, threads, a budget of bytes, and a line of progress."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

LARGEST_SLAB = 256 << 20


class Slab(NamedTuple):
    """Part `first` to `last` along the first dimension of the tensor `key`, and the bytes that working on it takes."""

    key: str
    first: int
    last: int
    bytes: int


class Budget:
    """Lets threads wait until the bytes that they ask for are free; one that asks for more than all goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._condition = threading.Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Hold so many bytes."""
        with self._condition:
            self._condition.wait_for(lambda: self._used == 0 or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._condition:
                self._used -= size
                self._condition.notify_all()


class Progress:
    """Bytes done of all, with rate and time left, on the console's line where there is a console."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, max(total, 1), 0
        self._lock, self._start, self._shown = threading.Lock(), time.monotonic(), 0.0

    def add(self, size: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self._done += size
            now = time.monotonic()
            if not sys.stderr.isatty() or (now - self._shown < 0.5 and self._done < self._total):
                return
            self._shown = now
            rate = self._done / max(now - self._start, 1e-9)
            left = (self._total - self._done) / max(rate, 1e-9)
            text = f"{self._what}: {self._done / self._total:4.0%}, {rate / 1e6:.0f} MB/s, {left:.0f} s left"
            end = "\n" if self._done >= self._total else ""
            print(f"\r{text:<70}", end=end, file=sys.stderr, flush=True)


def run_all(work: Callable[[Slab], None], slabs: Sequence[Slab], workers: int, budget: Budget) -> None:
    """Do the work on every slab, in order as far as several workers go; the first error ends it."""

    def one(slab: Slab) -> None:
        with budget.take(slab.bytes):
            work(slab)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, slab) for slab in slabs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
