"""Which implementation each operation uses here, and why: chosen once, printed once, never changed silently."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch

from ling.config.derived import activation_names
from ling.config.errors import UserError
from ling.config.schema import Config, PrecisionConfig, RuntimeConfig
from ling.platform import optional
from ling.platform.base import Platform


class Choice(NamedTuple):
    """An operation, what computes it, and the reason."""

    operation: str
    implementation: str
    reason: str


def choose(
    runtime: RuntimeConfig, platform_name: str, recipe: str = "bf16", activations: Collection[str] = ()
) -> dict[str, Choice]:
    """The implementation of every operation on a platform (`cpu` or `cuda`).

    Args:
        recipe: the number format of the run; fp8 needs Transformer Engine's layers.
        activations: names of those that the model has.

    Raises:
        UserError: an implementation that the config names cannot run here.
    """
    linear = _linear(runtime.backend, platform_name, recipe)
    choices = [
        _attention(runtime.attention, platform_name),
        _experts(runtime.grouped_gemm, linear.implementation),
        linear,
        Choice(
            "norm", "torch", "torch's fused rms_norm" if platform_name == "cuda" else "ling's RMSNorm, in eager torch"
        ),
        _activation(runtime.kernels, platform_name, activations),
        _optimizer(),
    ]
    return {choice.operation: choice for choice in choices}


def choose_for(config: Config, platform_name: str) -> dict[str, Choice]:
    """`choose` for a run, its precision recipe resolved."""
    return choose(config.runtime, platform_name, config.precision.recipe, activation_names(config.model))


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
    problem = _problem_on_gpu(package, platform_name)
    if problem:
        raise UserError(f"runtime.attention={wanted}: {package}: {problem}; set runtime.attention=auto")
    return Choice("attention", wanted, "named in the config")


def _linear(wanted: str, platform_name: str, recipe: str) -> Choice:
    problem = _problem_on_gpu("transformer_engine", platform_name)
    if wanted != "torch" and problem is None:
        return Choice("linear", "te", "Transformer Engine's linear layers, the norm in front of them fused")
    reason = f"transformer_engine: {problem}" if problem else "runtime.backend=torch"
    if wanted == "te":
        raise UserError(f"runtime.backend=te: {reason}; set runtime.backend=auto")
    if recipe == "fp8":
        raise UserError(f"precision.recipe=fp8 needs Transformer Engine's layers ({reason}); set precision.recipe=bf16")
    return Choice("linear", "torch", f"megatron-core's tensor-parallel linear layers ({reason})")


def _activation(wanted: str, platform_name: str, activations: Collection[str]) -> Choice:
    from ling.activations import ops

    problem = ops.problem(platform_name)
    without = sorted(name for name in activations if not ops.has_kernel(name))
    if wanted == "fused" and without and problem is None:
        problem = f"{', '.join(without)} has no compiled kernel"
    if wanted != "reference" and problem is None:
        detail = f", {ops.cpu_capability()}" if platform_name == "cpu" else ""
        detail += f"; readable torch math for {', '.join(without)}" if without else ""
        return Choice("activation", "fused", f"ling's compiled kernels{detail}")
    if wanted == "fused":
        raise UserError(f"runtime.kernels=fused: {problem}; set runtime.kernels=auto")
    return Choice("activation", "reference", f"readable torch math ({problem or 'runtime.kernels=reference'})")


def _problem_on_gpu(package: str, platform_name: str) -> str | None:
    return optional.find(package).problem or (None if platform_name == "cuda" else "it needs a CUDA device")


def _experts(wanted: str, linear: str) -> Choice:
    if linear == "te" and wanted in ("auto", "te"):
        return Choice("experts", "te", "Transformer Engine's grouped linear layers")
    if wanted == "te":
        raise UserError(
            "runtime.grouped_gemm=te: it goes with Transformer Engine's linear layers; set runtime.backend=te"
        )
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
