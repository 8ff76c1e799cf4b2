"""The fused FFN activations: torch operators, implemented by the compiled libraries ling/_C_cpu.so and ling/_C_cuda.so.

Schemas, shapes without data (meta device, torch.compile) and gradients are declared here, once for all devices; the
libraries, built from kernels/csrc, only add implementations. Math is fp32 inside, rounded once; the backward pass
computes everything again from the input, so only the input, the router weight and the scalars are kept for it.

Shape legend: T: tokens (any leading dimensions), F: width of the FFN or of a tensor-parallel shard of it, H: width of
fc1's output (2F gated, F else).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GATED = frozenset(
    {"powlu", "swiglu", "geglu", "geglu_tanh", "quick_geglu", "reglu"}
    | {"swiglu_clip", "swiglu_clip_post", "situ_glu", "fatreglu"}
)
UNGATED = frozenset({"relu", "relu2", "gelu", "silu", "elu", "selu"} | {"leaky_relu", "polyrelu", "crrelu", "series"})
ROWWISE = frozenset({"polynorm", "topk_relu"})
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_CAPABILITIES = ("baseline", "avx2", "avx512")
"""Instruction sets that the CPU's library is compiled for; LING_CPU_CAPABILITY in the environment picks one."""

_LIBRARIES = {platform: Path(__file__).parents[1] / f"_C_{platform}.so" for platform in ("cpu", "cuda")}
_SCHEMAS = (
    "ffn_activation(Tensor x, Tensor? weight, Tensor? scalars, str name, float[] params) -> Tensor",
    "ffn_activation_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? scalars, str name, float[] params,"
    " bool need_dweight, bool need_dscalars) -> (Tensor dx, Tensor dweight, Tensor dscalars)",
    "polynorm_sums(Tensor x) -> Tensor",
    "polynorm(Tensor x, Tensor sums, Tensor? weight, Tensor scalars, int width, float eps) -> Tensor",
    "polynorm_backward_sums(Tensor dy, Tensor x, Tensor sums, Tensor? weight, Tensor scalars, int width, float eps)"
    " -> (Tensor dots, Tensor dweight, Tensor dscalars)",
    "polynorm_backward(Tensor dy, Tensor x, Tensor sums, Tensor dots, Tensor? weight, Tensor scalars, int width,"
    " float eps) -> Tensor",
    "topk_relu_threshold(Tensor x, int k) -> (Tensor threshold, Tensor ties)",
    "topk_relu(Tensor x, Tensor threshold, Tensor ties, Tensor? weight) -> Tensor",
    "topk_relu_backward(Tensor dy, Tensor x, Tensor threshold, Tensor ties, Tensor? weight, bool need_dweight)"
    " -> (Tensor dx, Tensor dweight)",
    "ffn_activation_fp8(Tensor x, Tensor? weight, Tensor? scalars, str name, float[] params, bool power_of_2_scales)"
    " -> (Tensor rows, Tensor row_scale_inv, Tensor columns, Tensor column_scale_inv)",
    "ffn_activation_backward_fp8(Tensor dy, Tensor x, Tensor? weight, Tensor? scalars, str name, float[] params,"
    " bool power_of_2_scales, bool need_dweight, bool need_dscalars) -> (Tensor rows, Tensor row_scale_inv,"
    " Tensor columns, Tensor column_scale_inv, Tensor dweight, Tensor dscalars)",
)


def _declare() -> torch.library.Library:
    library = torch.library.Library("ling", "DEF")  # noqa: TOR901
    for schema in _SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return library


_library = _declare()


def has_kernel(name: str) -> bool:
    """Whether an activation of this name has fused kernels (on all devices that have a library)."""
    return name in GATED | UNGATED | ROWWISE


def problem(platform: str) -> str | None:
    """Why the fused operators cannot run on `cpu` or `cuda` here, in one line; None: they can."""
    return _PROBLEMS[platform]


def cpu_capability() -> str:
    """The instruction set that the CPU's library uses on this machine; RuntimeError where there is no library."""
    if _PROBLEMS["cpu"] is not None:
        raise RuntimeError(_PROBLEMS["cpu"])
    return _capability_of(ctypes.CDLL(str(_LIBRARIES["cpu"])))


def select_cpu_capability(name: str) -> None:
    """Use another instruction set from now on, to compare them; ValueError where this machine cannot run it."""
    if name not in CPU_CAPABILITIES or ctypes.CDLL(str(_LIBRARIES["cpu"])).ling_select_cpu_capability(name.encode()):
        raise ValueError(f"the CPU kernels cannot use {name!r} here; there are {', '.join(CPU_CAPABILITIES)}")


def _load(platform: str) -> str | None:
    path = _LIBRARIES[platform]
    if platform == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not path.is_file():
        needed = "a C++20 compiler" if platform == "cpu" else "nvcc (set CUDA_HOME)"
        return f"ling/{path.name} was not built: install {needed} and run pip install --editable . again"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"ling/{path.name} does not load: {str(error).splitlines()[0]}"
    if platform == "cpu":
        capability = _capability_of(ctypes.CDLL(str(path)))
        return None if capability in CPU_CAPABILITIES else capability.splitlines()[0]
    return None


def _capability_of(library: ctypes.CDLL) -> str:
    library.ling_cpu_capability.restype = ctypes.c_char_p
    return library.ling_cpu_capability().decode()


_PROBLEMS = {platform: _load(platform) for platform in _LIBRARIES}


def ffn_activation(x: Tensor, weight: Tensor | None, scalars: Tensor | None, name: str, params: list[float]) -> Tensor:
    """An element-wise activation, times the router weight.

    Args:
        x: `[..., H]` in fp32, bf16 or fp16: gate ‖ up if gated, else one projection.
        weight: `[...]`, one number per token, or None.
        scalars: 1-D, in the order of the registry's row; None where the activation has none.
        name: of GATED or UNGATED.
        params: hyper-parameters in the order of the registry's row; a limit that is off is inf, a choice its index.

    Returns:
        `[..., F]` in x's dtype; differentiable in x, weight and scalars.

    Raises:
        RuntimeError: no library for x's device; a wrong number of columns, weights, params or scalars; unknown name.
        TypeError: x has another dtype.
    """
    _check(x)
    return torch.ops.ling.ffn_activation(_rows(x), _contiguous(weight), _numbers(scalars), name, params)


def polynorm(
    x: Tensor,
    weight: Tensor | None,
    scalars: Tensor,
    eps: float,
    width: int | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """PolyNorm (see ling.activations.ungated), times the router weight.

    Args:
        x: `[..., F]` in fp32, bf16 or fp16; the whole width or a shard.
        weight: `[...]`, or None.
        scalars: `[4]`: a3, a2, a1, a0.
        eps: added to each mean square.
        width: the FFN's width over all shards; None: F.
        reduce: the sum of an fp32 `[T, 3]` over the shards, as a new tensor; None: there is one shard.

    Returns:
        `[..., F]` in x's dtype. The gradients of weight and scalars are this shard's parts.
    """
    _check(x)
    width = x.shape[-1] if width is None else width
    return _PolyNorm.apply(_rows(x), _contiguous(weight), _numbers(scalars), eps, width, reduce)


def topk_relu(
    x: Tensor,
    weight: Tensor | None,
    k: int,
    gather: Callable[[Tensor], Tensor] | None = None,
    shard: int = 0,
) -> Tensor:
    """The k largest of max(0, x) of each token, 0 elsewhere, times the router weight; of equal ones the first are kept.

    Args:
        x: `[..., F]` in fp32, bf16 or fp16; the whole width or one of several equally wide shards.
        weight: `[...]`, or None.
        k: how many a token keeps of the whole width.
        gather: the shards' tensors of one shape, stacked as `[shards, ...]`; None: there is one shard.
        shard: index of this shard.

    Returns:
        `[..., F]` in x's dtype. The gradient of weight is this shard's part.
    """
    _check(x)
    x = _rows(x)
    with torch.no_grad():
        if gather is None:
            threshold, ties = torch.ops.ling.topk_relu_threshold(x, k)
        else:
            threshold, ties = _sharded_threshold(x, k, gather, shard)
    return torch.ops.ling.topk_relu(x, threshold, ties, _contiguous(weight))


def _sharded_threshold(x: Tensor, k: int, gather: Callable[[Tensor], Tensor], shard: int) -> tuple[Tensor, Tensor]:
    """Threshold [T] of all shards, and how many of this shard's equal ones are kept: those of lower shards go first."""
    rows = x.reshape(-1, x.shape[-1]).float().clamp(min=0.0)
    candidates = rows.topk(min(k, rows.shape[-1]), dim=-1).values
    shards_TS = gather(candidates)
    flat = shards_TS.movedim(0, 1).flatten(1)
    threshold = flat.topk(min(k, flat.shape[-1]), dim=-1).values[:, -1]
    threshold = threshold.nan_to_num(nan=float("inf"), posinf=float("inf"))
    above = ((shards_TS > threshold[:, None]) | shards_TS.isnan()).sum((0, 2))
    equal = (shards_TS == threshold[:, None]).sum(2)
    left = k - above - equal[:shard].sum(0)
    ties = left.clamp(min=0).minimum(equal[shard]) * (threshold > 0)
    return threshold, ties.to(torch.int32)


def _check(x: Tensor) -> None:
    reason = _PROBLEMS.get(x.device.type)
    if reason is not None:
        raise RuntimeError(f"the fused FFN activation cannot run: {reason}")
    if x.dtype not in DTYPES:
        raise TypeError(f"the fused FFN activation takes float32, bfloat16 or float16, not {x.dtype}")


def _rows(x: Tensor) -> Tensor:
    """X, or a copy where its rows are not contiguous or not at one distance from each other."""
    regular = x.shape[-1] <= 1 or x.stride(-1) == 1
    distance = None
    for i in reversed(range(x.dim() - 1)):
        if x.shape[i] != 1:
            regular = regular and distance in (None, x.stride(i))
            distance = x.stride(i) * x.shape[i]
    # not contiguous(), which leaves the strides of an empty tensor as they are
    return x if regular else x.clone(memory_format=torch.contiguous_format)


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _numbers(scalars: Tensor | None) -> Tensor | None:
    return None if scalars is None else scalars.float().contiguous()


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, scalars, name, params = inputs
    ctx.save_for_backward(x, weight, scalars)
    ctx.call = (name, params)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scalars = ctx.saved_tensors
    _, need_dweight, need_dscalars, *_ = ctx.needs_input_grad
    dx, dweight, dscalars = torch.ops.ling.ffn_activation_backward(
        _rows(dy), x, weight, scalars, *ctx.call, need_dweight, need_dscalars
    )
    return dx, dweight if need_dweight else None, dscalars if need_dscalars else None, None, None


def _keep_topk_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _topk_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, threshold, ties, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad[3]
    dx, dweight = torch.ops.ling.topk_relu_backward(_rows(dy), x, threshold, ties, weight, needed)
    return dx, None, None, dweight if needed else None


class _PolyNorm(torch.autograd.Function):
    """Keeps three sums per token besides its inputs, which would cost a reduction over the shards to get again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        scalars: Tensor,
        eps: float,
        width: int,
        reduce: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        sums = torch.ops.ling.polynorm_sums(x)
        if reduce is not None:
            sums = reduce(sums)
        ctx.save_for_backward(x, weight, scalars, sums)
        ctx.call = (width, eps)
        ctx.reduce = reduce
        return torch.ops.ling.polynorm(x, sums, weight, scalars, width, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, scalars, sums = ctx.saved_tensors
        dy = _rows(grads[0])
        dots, dweight, dscalars = torch.ops.ling.polynorm_backward_sums(dy, x, sums, weight, scalars, *ctx.call)
        if ctx.reduce is not None:
            dots = ctx.reduce(dots)
        dx = torch.ops.ling.polynorm_backward(dy, x, sums, dots, weight, scalars, *ctx.call)
        return dx, None if weight is None else dweight, dscalars, None, None, None


# Shapes without data. What is not asked for is an empty vector.


def _fake_forward(x: Tensor, weight: Tensor | None, scalars: Tensor | None, name: str, params: list[float]) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2 if name in GATED else x.shape[-1]))


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    scalars: Tensor | None,
    name: str,
    params: list[float],
    need_dweight: bool,
    need_dscalars: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = _fake_dweight(x, weight, need_dweight)
    dscalars = x.new_empty(scalars.shape[0] if need_dscalars and scalars is not None else 0, dtype=torch.float32)
    return x.new_empty(x.shape), dweight, dscalars


def _fake_dweight(x: Tensor, weight: Tensor | None, needed: bool = True) -> Tensor:
    return x.new_empty(0, dtype=torch.float32) if weight is None or not needed else torch.empty_like(weight)


def _tokens(x: Tensor) -> int:
    count = 1
    for size in x.shape[:-1]:
        count *= size
    return count


def _fake_fp8(x: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and columns (transposed) of a result `[T, width]`, and a scale per 128 of each, padded to multiples of 4."""
    tokens = _tokens(x)
    return (
        x.new_empty((*x.shape[:-1], width), dtype=torch.float8_e4m3fn),
        x.new_empty(((width + 127) // 128, (tokens + 3) // 4 * 4), dtype=torch.float32),
        x.new_empty((width, tokens), dtype=torch.float8_e4m3fn),
        x.new_empty(((tokens + 127) // 128, (width + 3) // 4 * 4), dtype=torch.float32),
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "ffn_activation": _fake_forward,
    "ffn_activation_backward": _fake_backward,
    "polynorm_sums": lambda x: x.new_empty((_tokens(x), 3), dtype=torch.float32),
    "polynorm": lambda x, sums, weight, scalars, width, eps: x.new_empty(x.shape),
    "polynorm_backward_sums": lambda dy, x, sums, weight, scalars, width, eps: (
        torch.empty_like(sums),
        _fake_dweight(x, weight),
        torch.empty_like(scalars),
    ),
    "polynorm_backward": lambda dy, x, sums, dots, weight, scalars, width, eps: x.new_empty(x.shape),
    "topk_relu_threshold": lambda x, k: (
        x.new_empty(_tokens(x), dtype=torch.float32),
        x.new_empty(_tokens(x), dtype=torch.int32),
    ),
    "topk_relu": lambda x, threshold, ties, weight: x.new_empty(x.shape),
    "topk_relu_backward": lambda dy, x, threshold, ties, weight, need_dweight: (
        x.new_empty(x.shape),
        _fake_dweight(x, weight, need_dweight),
    ),
    "ffn_activation_fp8": lambda x, weight, scalars, name, params, power_of_2_scales: _fake_fp8(
        x, _fake_forward(x, weight, scalars, name, params).shape[-1]
    ),
    "ffn_activation_backward_fp8": lambda dy, x, weight, scalars, name, params, power_of_2_scales, *needed: (
        *_fake_fp8(x, x.shape[-1]),
        *_fake_backward(dy, x, weight, scalars, name, params, *needed)[1:],
    ),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"ling::{_name}", _fake, lib=_library)
torch.library.register_autograd("ling::ffn_activation", _backward, setup_context=_keep_inputs, lib=_library)
torch.library.register_autograd("ling::topk_relu", _topk_backward, setup_context=_keep_topk_inputs, lib=_library)
