"""What can be wrong with a run's data, found before its first step: files, tokenizer, sizes, token ids, repetition."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ling.config.derived import Source, consumed_samples_after, test_sources, train_sources, valid_sources
from ling.config.errors import UserError
from ling.config.schema import Config
from ling.data.index_file import check_prefix
from ling.data.samples import samples_in
from ling.data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

PROBES_OF_A_SOURCE, PROBES_OF_ALL = 16, 256  # places at which token ids are looked at
PROBE_TOKENS = 1 << 16
SLACK = 1.01  # a run may take so much more of a source than its tokens or epochs say before there is a warning


class Share(NamedTuple):
    """What a run takes of one training source."""

    source: Source
    share: float  # of the run's samples
    tokens: int  # of one epoch
    epochs: float  # that the run takes
    wanted: float | None  # epochs that the config asks for, where it counts in tokens or epochs


def check_data(config: Config) -> None:
    """Everything about data and tokenizer that can be wrong, cheaply and without torch, before ranks are started.

    Raises UserError: files missing, truncated, empty, prepared with another tokenizer, too small; vocabulary larger
    than the model's; token ids out of range; a source taken more often than data.max_epochs. Warns where a held-out
    source is too small for train.eval_iters, and where sources are taken more often than their tokens or epochs say.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens, the model knows {config.model.vocab_size}: "
            f"set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    sources, valid, test = train_sources(config), valid_sources(config), test_sources(config)
    probes = max(1, min(PROBES_OF_A_SOURCE, PROBES_OF_ALL // len([*sources, *valid, *test])))
    tokens = {source: _check_source(config, source, tokenizer, probes) for source in (*sources, *valid, *test)}
    _check_epochs(config, shares(config, sources, [tokens[source] for source in sources]))
    for source in valid:
        _check_valid(config, source, tokens[source])


def shares(config: Config, sources: Sequence[Source], tokens: Sequence[int]) -> list[Share]:
    """What the run takes of each training source; tokens: of one epoch of each."""
    length = config.data.sequence_length
    total = consumed_samples_after(config, config.train.train_iters)
    epochs = [samples_in(count, length) for count in tokens]
    weights = blend_weights(sources, epochs, length)
    result = []
    for source, weight, count, samples in zip(sources, weights, tokens, epochs, strict=True):
        wanted = None if source.unit == "weight" else weight / samples
        share = weight / sum(weights)
        result.append(Share(source, share, count, share * total / samples, wanted))
    return result


def blend_weights(sources: Sequence[Source], samples: Sequence[int], sequence_length: int) -> list[float]:
    """Weights of a blend from weights, epochs or tokens; samples: of one epoch of each source."""
    per_unit = {"weight": lambda count: 1.0, "epochs": float, "tokens": lambda count: 1 / sequence_length}
    return [source.weight * per_unit[source.unit](count) for source, count in zip(sources, samples, strict=True)]


def require_samples(source: Source, tokens: int, sequence_length: int) -> None:
    """Refuse a source that is too small for a single sample."""
    if not samples_in(tokens, sequence_length):
        part = " in this part of data.split" if source.span != (0.0, 1.0) else ""
        raise UserError(
            f"data {source.path} has {tokens} tokens{part}, too few for one sample of {sequence_length} + 1: "
            "give more text, or lower data.sequence_length"
        )


def check_ids(tokens: np.ndarray, vocab_size: int, path: str) -> None:
    """Refuse token ids that the model does not know."""
    for found in (int(tokens.max()), int(tokens.min())):
        if not 0 <= found < vocab_size:
            raise UserError(
                f"data {path} has the token id {found}, the model knows {vocab_size}: raise model.vocab_size, or "
                "prepare the data with the run's tokenizer"
            )


def _check_source(config: Config, source: Source, tokenizer: Tokenizer, probes: int) -> int:
    """The tokens of a source that passes all checks of its own; its token ids are looked at in some places."""
    index = check_prefix(source.path, tokenizer.fingerprint)
    first, end = (round(part * index.num_documents) for part in source.span)
    tokens = index.tokens_before(end) - index.tokens_before(first)
    require_samples(source, tokens, config.data.sequence_length)
    starts = np.linspace(0, max(0, index.num_tokens - PROBE_TOKENS), probes, dtype=np.int64)
    for start in dict.fromkeys(starts.tolist()):
        check_ids(index.tokens[start : start + PROBE_TOKENS], config.model.vocab_size, source.path)
    return tokens


def _check_epochs(config: Config, taken: Sequence[Share]) -> None:
    limit = config.data.max_epochs
    for share in taken:
        if limit is not None and share.epochs > limit:
            raise UserError(
                f"data.train: {share.source.path} is too small for its weight: the run takes {share.epochs:.2f} epochs "
                f"of it, data.max_epochs allows {limit:g}; lower its weight or train.train_iters, or give more text"
            )
    asked = [(share, share.wanted) for share in taken if share.wanted is not None]
    if asked and asked[0][0].epochs > SLACK * asked[0][1]:
        logger.warning(
            "data.train: the run takes %.2f times the tokens that its sources add up to: each is taken that much more",
            asked[0][0].epochs / asked[0][1],
        )


def _check_valid(config: Config, source: Source, tokens: int) -> None:
    batch = config.train.global_batch_size
    samples = samples_in(tokens, config.data.sequence_length)
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
