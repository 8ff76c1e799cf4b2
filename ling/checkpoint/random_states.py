"""Random states of a rank, for models that draw random numbers while they train (router jitter, dropout)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel

_DRAWING = ("hidden_dropout", "attention_dropout", "moe_input_jitter_eps")


def draws_numbers(chunks: list[Any]) -> bool:
    """Whether training this model draws random numbers. Initial weights and data have seeds of their own."""
    return any(getattr(chunk.config, name, None) for chunk in chunks for name in _DRAWING)


def file_of(rank: int) -> str:
    """Name of a rank's random states in a checkpoint."""
    return f"random_{rank:05d}.pt"


def capture() -> dict[str, torch.Tensor]:
    """This rank's random states: torch's, the GPU's, and megatron-core's own."""
    states = {f"megatron.{name}": state for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()}
    states["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: state.clone() for name, state in states.items()}


def restore(path: Path) -> None:
    """Set this rank's random states to those of a file."""
    states = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(states.pop("torch"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    tracked = {name.removeprefix("megatron."): state for name, state in states.items()}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)
