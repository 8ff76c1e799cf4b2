"""Which source each sample of a blend comes from: a pure function of the sample's number, with no state to resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 65536  # units of time, about as many samples, that are laid out at once


class _Block(NamedTuple):
    start: int  # number of its first sample
    sources: np.ndarray  # int32 [samples]
    local: np.ndarray  # int64 [samples]


class Blend:
    """Sources interleaved by weight, as evenly as can be.

    Source s, of normalised weight w, gives its k-th sample at the time (k + 1/2) / w, and samples are numbered in the
    order of their times: so before any time each source is at most half a sample from its share, and how many it gave
    is known in closed form. Blocks of BLOCK units of time are laid out when asked for.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = math.fsum(weights)
        self.weights = np.array([weight / total for weight in weights], dtype=np.float64)
        self._number, self._block = 0, _Block(0, np.empty(0, np.int32), np.empty(0, np.int64))

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a global sample, and how many samples that source gave before it."""
        offset = sample - self._block.start
        if not 0 <= offset < len(self._block.sources):
            self._load(sample)
            offset = sample - self._block.start
        return int(self._block.sources[offset]), int(self._block.local[offset])

    def given_before(self, sample: int) -> np.ndarray:
        """Samples that each source gives before a global sample: int64 [sources]."""
        self.locate(sample)
        before = self._block.sources[: sample - self._block.start]
        return self._given_before(self._number) + np.bincount(before, minlength=len(self.weights))

    def _given_before(self, block: int) -> np.ndarray:
        """Samples that each source gave before the block's time: int64 [sources]."""
        return np.ceil(self.weights * (block * BLOCK) - 0.5).astype(np.int64)

    def _load(self, sample: int) -> None:
        block = sample // BLOCK  # off by little: each source is at most half a sample from its share
        while self._given_before(block).sum() > sample:
            block -= 1
        while self._given_before(block + 1).sum() <= sample:
            block += 1
        first, end = self._given_before(block), self._given_before(block + 1)
        counts = end - first
        sources = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        local = first[sources] + within
        order = np.argsort((local + 0.5) / self.weights[sources], kind="stable")
        self._number, self._block = block, _Block(int(first.sum()), sources[order], local[order])
