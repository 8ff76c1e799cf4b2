"""Samples and batches: which tokens come when depends on the seed and the samples consumed, and on nothing else.

Not on ranks, workers, or the length of the run: each epoch of each source is shuffled by (seed, number of the source,
epoch), and a blend is a pure function of the sample's number. S below is the sequence length.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ling.config.derived import Source, data_sources
from ling.config.errors import UserError
from ling.config.schema import Config
from ling.data.blend import Blend
from ling.data.index_file import Index, check_prefix, read_index
from ling.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

EPOCHS_KEPT = 2
DOCUMENT_ORDER, SAMPLE_ORDER = 0, 1  # tell the two shuffles of an epoch apart


class _Epoch(NamedTuple):
    documents: np.ndarray  # [N] their order
    starts: np.ndarray  # int64 [N + 1] where each begins in the epoch's run of tokens
    samples: np.ndarray | None  # [samples] their order; None: as they lie


class SourceSamples:
    """The samples of one source, epoch after epoch: documents in shuffled order, laid end to end, cut every S tokens.

    A sample has S + 1 tokens, the last of which begins the next sample. What is left at an epoch's end (less than S + 1
    tokens) is not used; which text that is changes with the epoch.
    """

    def __init__(self, index: Index, sequence_length: int, seed: int, number: int, shuffle: bool) -> None:
        self.index = index
        self.num_samples = samples_in(index.num_tokens, sequence_length)
        self._sequence_length = sequence_length
        self._key = (seed, number)
        self._shuffle = shuffle
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def tokens(self, sample: int) -> np.ndarray:
        """Tokens of the source's sample, counted over all epochs: int64 [S + 1]."""
        number, within = divmod(sample, self.num_samples)
        epoch = self._epoch(number)
        place = within if epoch.samples is None else int(epoch.samples[within])
        begin = place * self._sequence_length
        out = np.empty(self._sequence_length + 1, dtype=np.int64)
        document = int(np.searchsorted(epoch.starts, begin, side="right")) - 1
        offset = begin - int(epoch.starts[document])
        filled = 0
        while filled < len(out):
            source = epoch.documents[document]
            take = min(int(self.index.lengths[source]) - offset, len(out) - filled)
            first = int(self.index.pointers[source]) // self.index.dtype.itemsize + offset
            out[filled : filled + take] = self.index.tokens[first : first + take]
            filled, document, offset = filled + take, document + 1, 0
        return out

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            self._epochs[number] = self._build_epoch(number)
            if len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _build_epoch(self, number: int) -> _Epoch:
        count = self.index.num_documents
        documents = permutation(count, *self._key, number, DOCUMENT_ORDER) if self._shuffle else np.arange(count)
        starts = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(self.index.lengths[documents], out=starts[1:])
        samples = permutation(self.num_samples, *self._key, number, SAMPLE_ORDER) if self._shuffle else None
        return _Epoch(documents, starts, samples)


class SampleStream:
    """Training samples by number: `sample(i)` is a pure function of i and the arguments here.

    sources: prefixes of .bin/.idx with weights (shares of the samples). repeat: start a new epoch at the end of a
    source; without it (one source only) the stream has `num_samples` samples. vocab_size: token ids from here on are
    refused. The options' meaning is that of the config keys of the same name. Raises UserError for unusable files.
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
        eod_mask_loss: bool = False,
    ) -> None:
        assert repeat or len(sources) == 1, "a blend has no end"
        self.sources = list(sources)
        self.sequence_length = sequence_length
        self._parts = [
            SourceSamples(read_index(source.path), sequence_length, seed, number, shuffle)
            for number, source in enumerate(sources)
        ]
        for source, part in zip(sources, self._parts, strict=True):
            _require_samples(source, part.index, sequence_length)
        self.num_samples = None if repeat else self._parts[0].num_samples
        self._blend = Blend([source.weight for source in sources])
        self._eos_id = eos_id
        self._vocab_size = vocab_size
        self._reset_attention_mask = reset_attention_mask
        self._eod_mask_loss = eod_mask_loss

    def sample(self, i: int) -> dict[str, np.ndarray]:
        """Sample number i of the stream.

        tokens, labels (the tokens one further on) and position_ids int64 [S], loss_mask float32 [S]; with
        reset_attention_mask also document_ids int64 [S], which counts the documents within the sample from 0.
        """
        if i < 0 or (self.num_samples is not None and i >= self.num_samples):
            raise IndexError(f"sample {i} of a stream of {self.num_samples}")
        number, local = self._blend.locate(i)
        run = self._parts[number].tokens(local)
        if self._vocab_size is not None and int(run.max()) >= self._vocab_size:
            raise UserError(
                f"data {self.sources[number].path} has the token id {int(run.max())}, the model knows "
                f"{self._vocab_size}: raise model.vocab_size, or prepare the data with the run's tokenizer"
            )
        tokens, labels = run[:-1], run[1:]
        ends = tokens == self._eos_id
        begins = np.zeros(len(tokens), dtype=bool)
        begins[1:] = ends[:-1]
        out = {"tokens": tokens, "labels": labels, "loss_mask": np.ones(len(tokens), dtype=np.float32)}
        if self._eod_mask_loss:
            out["loss_mask"][ends] = 0.0
        # Positions run through the sample: rotary embeddings see differences only, within a document as without.
        out["position_ids"] = np.arange(len(tokens), dtype=np.int64)
        if self._reset_attention_mask:
            out["document_ids"] = np.cumsum(begins, dtype=np.int64)
        return out


def build_train_stream(config: Config) -> SampleStream:
    """The run's training samples: all of data.train, blended and shuffled, without end."""
    return _build(config, data_sources(config.data.train, "data.train"), shuffle=True, repeat=True)


def build_valid_streams(config: Config) -> dict[str, SampleStream]:
    """The held-out samples by the name of their source, in the order of the file, each token at most once."""
    sources = data_sources(config.data.valid, "data.valid")
    return {source.name: _build(config, [source], shuffle=False, repeat=False) for source in sources}


def eval_batches(stream: SampleStream, config: Config) -> int:
    """Global batches of one evaluation of a held-out stream: train.eval_iters, or as many as it has."""
    assert stream.num_samples is not None, "held-out streams end"
    return min(config.train.eval_iters, stream.num_samples // config.train.global_batch_size)


def check_data(config: Config) -> None:
    """Everything about data and tokenizer that can be wrong, cheaply and without torch, before ranks are started.

    Raises UserError: files missing, truncated, empty, prepared with another tokenizer, too small; vocabulary larger
    than the model's. Warns where a held-out source is too small for train.eval_iters.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens, the model knows {config.model.vocab_size}: "
            f"set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    for source in data_sources(config.data.train, "data.train"):
        index = check_prefix(source.path, tokenizer.fingerprint)
        _require_samples(source, index, config.data.sequence_length)
    batch = config.train.global_batch_size
    for source in data_sources(config.data.valid, "data.valid"):
        index = check_prefix(source.path, tokenizer.fingerprint)
        _require_samples(source, index, config.data.sequence_length)
        samples = samples_in(index.num_tokens, config.data.sequence_length)
        if samples < batch:
            raise UserError(
                f"data.valid: {source.path} has {samples} samples of {config.data.sequence_length} tokens, less than "
                f"one global batch of {batch}: hold out more text, or lower train.global_batch_size"
            )
        if samples // batch < config.train.eval_iters:
            logger.warning(
                "data.valid: %s is enough for %d of the %d batches of train.eval_iters; evaluations use those",
                source.path,
                samples // batch,
                config.train.eval_iters,
            )


def samples_in(num_tokens: int, sequence_length: int) -> int:
    """Samples of one epoch: cut every S tokens, each with one token more."""
    return max(0, (num_tokens - 1) // sequence_length)


def permutation(count: int, *key: int) -> np.ndarray:
    """A shuffle of range(count) that depends on the key alone: int64 [count].

    It sorts raw output of a named bit generator, which NumPy promises never to change, unlike Generator.permutation.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable")


class BatchIterator:
    """The micro-batches of one data-parallel rank, in order, from any position on.

    Micro-batch m after `consumed_samples` has, on rank r of d, the samples `consumed + m*micro*d + r*micro` and
    following: a step's global batch is the next `global_batch_size` samples of the stream however many ranks share it.
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


def _build(config: Config, sources: list[Source], shuffle: bool, repeat: bool) -> SampleStream:
    return SampleStream(
        sources,
        load_tokenizer(config.data.tokenizer).eos_id,
        config.data.sequence_length,
        config.run.seed,
        shuffle=shuffle,
        repeat=repeat,
        vocab_size=config.model.vocab_size,
        reset_attention_mask=config.data.reset_attention_mask,
        eod_mask_loss=config.data.eod_mask_loss,
    )


def _require_samples(source: Source, index: Index, sequence_length: int) -> None:
    if not samples_in(index.num_tokens, sequence_length):
        raise UserError(
            f"data {source.path} has {index.num_tokens} tokens, too few for one sample of {sequence_length} + 1: "
            "give more text, or lower data.sequence_length"
        )
