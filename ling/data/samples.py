"""The samples of one source, epoch after epoch, and the shuffles behind them, in memory or memory-mapped from a cache.

S below is the sequence length. An epoch's order is a pure function of (seed, number of the source, epoch), so a cached
file is only a way not to compute it again in every process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ling.config.errors import UserError
from ling.data.index_file import Index
from ling.data.mapping import map_file, part_of

logger = logging.getLogger(__name__)

EPOCHS_KEPT = 2
DOCUMENT_ORDER, SAMPLE_ORDER = 0, 1  # tell the two shuffles of an epoch apart
CACHE_FORMAT = b"LINGEPO1"


class Piece(NamedTuple):
    """A run of tokens of one document."""

    document: int  # its number in PREFIX.idx
    offset: int  # of the first token within the document
    tokens: int


class Epoch(NamedTuple):
    """The order of one epoch."""

    documents: np.ndarray  # [N] their order, counted from the source's first document
    starts: np.ndarray  # int64 [N + 1] where each begins in the epoch's run of tokens
    samples: np.ndarray | None  # [samples] their order; None: as they lie


class SourceSamples:
    """The samples of one source, epoch after epoch: documents in shuffled order, laid end to end, cut every S tokens.

    A sample has S + 1 tokens, the last of which begins the next sample. What is left at an epoch's end (less than S + 1
    tokens) is not used; which text that is changes with the epoch.

    span: the part of the documents that is used, as fractions. `cache` is a folder for shuffles; None: made in memory.
    """

    def __init__(
        self,
        index: Index,
        sequence_length: int,
        seed: int,
        number: int,
        shuffle: bool,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.index = index
        self.first, self.end = (round(part * index.num_documents) for part in span)
        self.num_tokens = index.tokens_before(self.end) - index.tokens_before(self.first)
        self.num_samples = samples_in(self.num_tokens, sequence_length)
        self.cache: Path | None = None
        self._sequence_length = sequence_length
        self._key = (seed, number)
        self._shuffle = shuffle
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without the orders at hand: another process maps or makes its own."""
        return {**self.__dict__, "_epochs": OrderedDict()}

    @property
    def num_documents(self) -> int:
        """Documents of one epoch."""
        return self.end - self.first

    def tokens(self, sample: int) -> np.ndarray:
        """Tokens of the source's sample, counted over all epochs: int64 [S + 1]."""
        out = np.empty(self._sequence_length + 1, dtype=np.int64)
        filled = 0
        for document, offset, count in self.pieces(sample):
            first = int(self.index.pointers[document]) // self.index.dtype.itemsize + offset
            out[filled : filled + count] = self.index.tokens[first : first + count]
            filled += count
        return out

    def pieces(self, sample: int) -> Iterator[Piece]:
        """Where the S + 1 tokens of the source's sample come from, in order."""
        number, within = divmod(sample, self.num_samples)
        epoch = self.epoch(number)
        place = within if epoch.samples is None else int(epoch.samples[within])
        begin = place * self._sequence_length
        at = int(np.searchsorted(epoch.starts, begin, side="right")) - 1
        offset, wanted = begin - int(epoch.starts[at]), self._sequence_length + 1
        while wanted:
            document = self.first + int(epoch.documents[at])
            count = min(int(self.index.lengths[document]) - offset, wanted)
            if count:
                yield Piece(document, offset, count)
            wanted, at, offset = wanted - count, at + 1, 0

    def epoch(self, number: int) -> Epoch:
        """The order of an epoch, from memory, the cache or computed."""
        if number not in self._epochs:
            self._epochs[number] = self._build(number) if self.cache is None else self._cached(self.cache, number)
            if len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def is_cached(self, number: int) -> bool:
        """Whether the epoch's order lies in the cache."""
        return self.cache is not None and self._file(self.cache, number).exists()

    def _build(self, number: int) -> Epoch:
        count, lengths = self.num_documents, self.index.lengths[self.first : self.end]
        documents = permutation(count, *self._key, number, DOCUMENT_ORDER) if self._shuffle else np.arange(count)
        starts = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(lengths[documents], out=starts[1:])
        samples = permutation(self.num_samples, *self._key, number, SAMPLE_ORDER) if self._shuffle else None
        return Epoch(documents, starts, samples)

    def _fingerprint(self, number: int) -> bytes:
        """Everything that the order of an epoch follows from: the documents, the cutting and the key."""
        parts = (self.index.identity(), self.first, self.end, self._sequence_length, *self._key, number)
        return hashlib.sha256(repr(parts).encode()).digest()[:24]

    def _file(self, folder: Path, number: int) -> Path:
        return folder / f"{self._fingerprint(number).hex()}.epoch"

    def cache_epoch(self, number: int) -> Path:
        """Put an epoch's order into the cache if it is not there; one process does, others wait. Raises OSError."""
        assert self.cache is not None
        path = self._file(self.cache, number)
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.exists():
                    self._write(path, number)
        return path

    def _cached(self, folder: Path, number: int) -> Epoch:
        try:
            path = self.cache_epoch(number)
        except OSError as error:
            _warn(folder, error.strerror or str(error))
            return self._build(number)
        return self._read(path, number)

    def _write(self, path: Path, number: int) -> None:
        epoch = self._build(number)
        assert epoch.samples is not None
        partial = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}")
        try:
            with open(partial, "wb") as file:
                file.write(CACHE_FORMAT + self._fingerprint(number))
                epoch.starts.astype("<i8").tofile(file)
                for order in (epoch.documents, epoch.samples):
                    order.astype(_narrowest(len(order))).tofile(file)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _read(self, path: Path, number: int) -> Epoch:
        count, samples = self.num_documents, self.num_samples
        head = CACHE_FORMAT + self._fingerprint(number)
        sizes = [len(head), 8 * (count + 1), _narrowest(count).itemsize * count, _narrowest(samples).itemsize * samples]
        with open(path, "rb") as file:
            found = file.read(len(head))
        if found != head or path.stat().st_size != sum(sizes):
            raise UserError(f"{path} is damaged or no order of this data: remove it, it is made again")
        mapped = map_file(path)
        return Epoch(
            starts=part_of(mapped, "<i8", count + 1, sizes[0]),
            documents=part_of(mapped, _narrowest(count), count, sum(sizes[:2])),
            samples=part_of(mapped, _narrowest(samples), samples, sum(sizes[:3])),
        )


def samples_in(num_tokens: int, sequence_length: int) -> int:
    """Samples of one epoch: cut every S tokens, each with one token more."""
    return max(0, (num_tokens - 1) // sequence_length)


def permutation(count: int, *key: int) -> np.ndarray:
    """A shuffle of range(count) that depends on the key alone: int64 [count].

    It sorts raw output of a named bit generator, which NumPy promises never to change, unlike Generator.permutation.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable")


@cache
def _warn(folder: Path, reason: str) -> None:
    logger.warning(
        "%s cannot be written (%s): every process makes the order of the data in memory; set data.cache_dir to another "
        "folder, or run `ling data index` where it can be written",
        folder,
        reason,
    )


def _narrowest(count: int) -> np.dtype[Any]:
    return np.dtype("<u4" if count <= 2**32 else "<i8")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Hold a lock that dies with its process. Where the file system has none, several processes do the same work."""
    with open(path, "wb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    path.unlink(missing_ok=True)
