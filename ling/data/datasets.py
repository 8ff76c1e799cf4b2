"""Samples and batches: which tokens come when depends on the seed and the samples consumed, and on nothing else.

Not on ranks, workers, or the length of the run: each epoch of each source is shuffled by (seed, number of the source,
epoch), and a blend is a pure function of the sample's number. S below is the sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ling.config.derived import Source, cache_dir, test_sources, train_sources, valid_sources
from ling.config.errors import UserError
from ling.config.schema import Config
from ling.data.blend import Blend
from ling.data.checks import blend_weights, check_ids, require_samples
from ling.data.checks import check_data as check_data
from ling.data.index_file import read_index
from ling.data.samples import Piece, SourceSamples
from ling.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch

CACHED_FROM = 1 << 20  # documents and samples of all sources together; what is less takes a fraction of a second


class Origin(NamedTuple):
    """Where a sample comes from."""

    source: Source
    epoch: int
    pieces: list[Piece]


class SampleStream:
    """Training samples by number: `sample(i)` is a pure function of i and the arguments here.

    sources: prefixes of .bin/.idx with weights (shares of the samples). repeat: start a new epoch at the end of a
    source; without it (one source only) the stream has `num_samples` samples. vocab_size: token ids from here on are
    refused. cache: folder for the shuffles of large sources. The options' meaning is that of the config keys of the
    same name. Raises UserError for unusable files.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        eos_id: int,
        sequence_length: int,
        seed: int,
        *,
        shuffle: bool = True,
        repeat: bool = True,
        vocab_size: int | None = None,
        reset_attention_mask: bool = False,
        reset_position_ids: bool = False,
        eod_mask_loss: bool = False,
        cache: Path | None = None,
    ) -> None:
        assert repeat or len(sources) == 1, "a blend has no end"
        self.sources = list(sources)
        self.sequence_length = sequence_length
        self.parts = [
            SourceSamples(read_index(source.path), sequence_length, seed, number, shuffle, source.span)
            for number, source in enumerate(sources)
        ]
        for source, part in zip(sources, self.parts, strict=True):
            require_samples(source, part.num_tokens, sequence_length)
        if shuffle and sum(part.num_documents + part.num_samples for part in self.parts) >= CACHED_FROM:
            for part in self.parts:
                part.cache = cache
        self.num_samples = None if repeat else self.parts[0].num_samples
        self.blend = Blend(blend_weights(self.sources, [part.num_samples for part in self.parts], sequence_length))
        self._eos_id = eos_id
        self._vocab_size = vocab_size
        self._reset_attention_mask = reset_attention_mask
        self._reset_position_ids = reset_position_ids
        self._eod_mask_loss = eod_mask_loss

    def sample(self, i: int) -> dict[str, np.ndarray]:
        """Sample number i of the stream.

        tokens, labels (the tokens one further on) and position_ids int64 [S], loss_mask float32 [S]; with
        reset_attention_mask also document_ids int64 [S], which counts the documents within the sample from 0.
        """
        number, local = self._locate(i)
        run = self.parts[number].tokens(local)
        if self._vocab_size is not None:
            check_ids(run, self._vocab_size, self.sources[number].path)
        tokens, labels = run[:-1], run[1:]
        ends = tokens == self._eos_id
        begins = np.zeros(len(tokens), dtype=bool)
        begins[1:] = ends[:-1]
        out = {"tokens": tokens, "labels": labels, "loss_mask": np.ones(len(tokens), dtype=np.float32)}
        if self._eod_mask_loss:
            out["loss_mask"][ends] = 0.0
        out["position_ids"] = np.arange(len(tokens), dtype=np.int64)
        if self._reset_position_ids:
            out["position_ids"] -= np.maximum.accumulate(np.where(begins, out["position_ids"], 0))
        if self._reset_attention_mask:
            out["document_ids"] = np.cumsum(begins, dtype=np.int64)
        return out

    def origin(self, i: int) -> Origin:
        """The documents, and the tokens of each, that sample number i is made of; its last token is a label only."""
        number, local = self._locate(i)
        part = self.parts[number]
        return Origin(self.sources[number], local // part.num_samples, list(part.pieces(local)))

    def epochs_after(self, samples: int) -> list[int]:
        """Epochs of each source, begun ones included, that the first so many samples take from."""
        taken = self.blend.given_before(samples)
        return [-(-int(count) // part.num_samples) for count, part in zip(taken, self.parts, strict=True)]

    def _locate(self, i: int) -> tuple[int, int]:
        if i < 0 or (self.num_samples is not None and i >= self.num_samples):
            raise IndexError(f"sample {i} of a stream of {self.num_samples}")
        return self.blend.locate(i)


def build_train_stream(config: Config) -> SampleStream:
    """The run's training samples: all of data.train, blended and shuffled, without end."""
    return _build(config, train_sources(config), shuffle=True, repeat=True)


def build_valid_streams(config: Config) -> dict[str, SampleStream]:
    """The held-out samples by the name of their source, in the order of the file, each token at most once."""
    return _build_each(config, valid_sources(config))


def build_test_streams(config: Config) -> dict[str, SampleStream]:
    """The samples of the last test, as `build_valid_streams`."""
    return _build_each(config, test_sources(config))


def eval_batches(stream: SampleStream, config: Config) -> int:
    """Global batches of one evaluation of a held-out stream: train.eval_iters, or as many as it has."""
    assert stream.num_samples is not None, "held-out streams end"
    return min(config.train.eval_iters, stream.num_samples // config.train.global_batch_size)


class BatchIterator:
    """The micro-batches of one data-parallel rank, in order, from any position on.

    Micro-batch m after `consumed_samples` has, on rank r of d, the samples `consumed + m*micro*d + r*micro` and
    following: a step's global batch is the next samples of the stream, however many ranks share it, however many there
    are in it (train.rampup_batch_size), and however many there were in the steps before.
    Yields the fields of `SampleStream.sample` stacked to CPU tensors [micro, S]; ends where the stream does.
    num_workers: processes that read ahead; they change nothing but the time. Raises UserError for a global batch that
    does not divide evenly.
    """

    def __init__(
        self,
        stream: SampleStream,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int = 0,
        num_workers: int = 0,
    ) -> None:
        if global_batch_size % (micro_batch_size * dp_size):
            raise UserError(
                f"train.global_batch_size {global_batch_size} is no multiple of train.micro_batch_size "
                f"{micro_batch_size} x {dp_size} data-parallel ranks: change one of them"
            )
        assert 0 <= dp_rank < dp_size
        self._per_micro_batch = micro_batch_size * dp_size
        self._consumed = consumed_samples
        places = _Places(stream, micro_batch_size, dp_rank, self._per_micro_batch, consumed_samples)
        self._batches = _read_ahead(stream, places, num_workers) if num_workers else _read(stream, places)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Itself."""
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next micro-batch of this rank."""
        batch = next(self._batches)
        self._consumed += self._per_micro_batch
        return batch

    @property
    def consumed_samples(self) -> int:
        """Samples that all ranks together have taken when each has yielded as many micro-batches as this one."""
        return self._consumed

    def close(self) -> None:
        """Stop the processes that read ahead."""
        self._batches = iter(())


class _Places:
    """Sample numbers of each micro-batch of a rank."""

    def __init__(self, stream: SampleStream, micro: int, rank: int, stride: int, consumed: int) -> None:
        self._stream, self._micro, self._rank, self._stride, self._consumed = stream, micro, rank, stride, consumed

    def __iter__(self) -> Iterator[list[int]]:
        start, end = self._consumed, self._stream.num_samples
        while end is None or start + self._stride <= end:
            first = start + self._rank * self._micro
            yield list(range(first, first + self._micro))
            start += self._stride


class _ByNumber:
    """A stream as torch's DataLoader wants it."""

    def __init__(self, stream: SampleStream) -> None:
        self._stream = stream

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self._stream.sample(i)


def _read(stream: SampleStream, places: _Places) -> Iterator[dict[str, torch.Tensor]]:
    for numbers in places:
        yield stack([stream.sample(i) for i in numbers])


def _read_ahead(stream: SampleStream, places: _Places, num_workers: int) -> Iterator[dict[str, torch.Tensor]]:
    import torch
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        _ByNumber(stream),  # type: ignore[arg-type]
        batch_sampler=places,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=stack,
        generator=torch.Generator(),  # its own: the loader must not draw from the run's
    )
    return iter(loader)


def stack(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Samples of a stream as one batch of CPU tensors, `[B, S]` each."""
    import torch

    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


def _build_each(config: Config, sources: Sequence[Source]) -> dict[str, SampleStream]:
    return {source.name: _build(config, [source], shuffle=False, repeat=False) for source in sources}


def _build(config: Config, sources: Sequence[Source], shuffle: bool, repeat: bool) -> SampleStream:
    return SampleStream(
        sources,
        load_tokenizer(config.data.tokenizer).eos_id,
        config.data.sequence_length,
        config.run.seed,
        shuffle=shuffle,
        repeat=repeat,
        vocab_size=config.model.vocab_size,
        reset_attention_mask=config.data.reset_attention_mask,
        reset_position_ids=config.data.reset_position_ids,
        eod_mask_loss=config.data.eod_mask_loss,
        cache=cache_dir(config),
    )
