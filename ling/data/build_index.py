"""Shuffles of a run computed ahead, so that thousands of ranks start by mapping files."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple, TextIO

from ling.data.datasets import SampleStream
from ling.data.samples import SourceSamples


class Built(NamedTuple):
    """What a call of `build_index` did."""

    needed: int  # shuffles of whole epochs; 0: they are small and made in memory
    made: int


def build_index(stream: SampleStream, samples: int, workers: int = 1, progress: TextIO | None = None) -> Built:
    """Compute and cache the order of all epochs that the first `samples` samples take from, where it is not cached yet.

    workers: processes; each holds the order of one source's epoch, some 40 bytes per document while it sorts.
    """
    if all(part.cache is None for part in stream.parts):
        return Built(0, 0)
    epochs = stream.epochs_after(samples)
    needed = [(part, number) for part, count in zip(stream.parts, epochs, strict=True) for number in range(count)]
    missing = [(part, number) for part, number in needed if not part.is_cached(number)]
    if workers == 1 or len(missing) < 2:
        for done, (part, number) in enumerate(missing, 1):
            _make(part, number)
            _show(progress, done, len(missing))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for done, _ in enumerate(pool.map(_make, *zip(*missing, strict=True), chunksize=8), 1):
                _show(progress, done, len(missing))
    return Built(len(needed), len(missing))


def _make(part: SourceSamples, number: int) -> None:
    part.cache_epoch(number)


def _show(progress: TextIO | None, done: int, total: int) -> None:
    if progress is not None and progress.isatty():
        progress.write(f"\r{done}/{total} epochs{chr(10) if done == total else ''}")
        progress.flush()
