"""Which implementation each operation uses here, and why: chosen once, printed once, never changed silently."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ling.config.errors import UserError
from ling.config.schema import PrecisionConfig, RuntimeConfig
from ling.platform import optional
from ling.platform.base import Platform


class Choice(NamedTuple):
    """An operation, what computes it, and the reason."""

    operation: str
    implementation: str
    reason: str


def choose(runtime: RuntimeConfig, platform_name: str) -> dict[str, Choice]:
    """The implementation of every operation on a platform (`cpu` or `cuda`).

    Raises:
        UserError: an implementation that the config names cannot run here.
    """
    choices = [
        _attention(runtime.attention, platform_name),
        _experts(runtime.grouped_gemm),
        Choice("linear", "torch", "megatron-core's tensor-parallel linear layers"),
        Choice(
            "norm", "torch", "torch's fused rms_norm" if platform_name == "cuda" else "ling's RMSNorm, in eager torch"
        ),
        Choice("activation", "reference", "reference math, recomputed in the backward pass"),
        _optimizer(),
    ]
    return {choice.operation: choice for choice in choices}


def precision_recipe(precision: PrecisionConfig, platform: Platform) -> str:
    """The number format of a run: the recipe of the config, `auto` resolved for this machine."""
    if precision.recipe != "auto":
        return precision.recipe
    return "bf16" if platform.bf16_is_fast() else "fp32"


def _attention(wanted: str, platform_name: str) -> Choice:
    if wanted in ("auto", "sdpa"):
        reason = "torch's flash and cuDNN kernels" if platform_name == "cuda" else "torch's CPU flash kernel"
        return Choice("attention", "sdpa", reason)
    package = {"flash": "flash_attn", "te": "transformer_engine"}[wanted]
    problem = optional.find(package).problem or (None if platform_name == "cuda" else "it needs a CUDA device")
    if problem:
        raise UserError(f"runtime.attention={wanted}: {package}: {problem}; set runtime.attention=auto")
    return Choice("attention", wanted, "named in the config")


def _experts(wanted: str) -> Choice:
    has_grouped_mm = hasattr(torch.nn.functional, "grouped_mm")
    if wanted == "grouped_mm" and not has_grouped_mm:
        raise UserError(
            f"runtime.grouped_gemm=grouped_mm: torch {torch.__version__} has no grouped_mm; "
            "set runtime.grouped_gemm=loop"
        )
    if wanted == "loop":
        return Choice("experts", "loop", "named in the config")
    if has_grouped_mm:
        return Choice("experts", "grouped_mm", "torch.nn.functional.grouped_mm")
    return Choice("experts", "loop", f"torch {torch.__version__} has no grouped_mm")


def _optimizer() -> Choice:
    for package in ("transformer_engine", "apex"):
        if optional.find(package).problem is None:
            return Choice("optimizer", package, "its FusedAdam, in megatron-core's distributed optimizer")
    return Choice(
        "optimizer", "torch", "ling's AdamW on torch's fused kernel, in megatron-core's distributed optimizer"
    )
