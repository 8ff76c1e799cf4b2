"""Tokens to compare two models on: of the run's validation data, where that is still there."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from ling.config.errors import UserError
from ling.data.datasets import build_valid_streams
from ling.hf.export import Source


@dataclass
class Sample:
    """Tokens `[B, S]`, and what they are, in words."""

    tokens: torch.Tensor
    origin: str


def sample_tokens(source: Source, data: str | None = None, sequences: int = 2, longest: int = 256) -> Sample:
    """The first sequences of `data` (a prefix), else of the run's validation data, else random tokens.

    Raises:
        UserError: `data` cannot be read.
    """
    config = copy.deepcopy(source.config)
    config.data.tokenizer = str(source.folder / "tokenizer")
    if data is not None:
        config.data.valid = data
    length = min(longest, config.data.sequence_length)
    problem = "the run has no validation data"
    if config.data.valid is not None:
        try:
            name, stream = next(iter(build_valid_streams(config).items()))
            samples = [stream.sample(i)["tokens"][:length] for i in range(sequences)]
            return Sample(torch.stack([torch.as_tensor(row).long() for row in samples]), f"validation data {name!r}")
        except (UserError, OSError, IndexError) as error:
            if data is not None:
                raise UserError(f"--data {data}: {error}") from None
            problem = str(error)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(source.config.model.vocab_size, (sequences, length), generator=generator)
    return Sample(tokens, f"random text ({problem})")
