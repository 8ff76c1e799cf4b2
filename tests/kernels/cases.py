"""What the kernels' tests share: every activation with settings, a grid of inputs, truth in float64, errors in ulps."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ling.activations import ResolvedActivation, resolve
from ling.activations.reference import phi

# id -> (spec, ulps allowed in fp32, in bf16 and fp16) on the CPU, where twice the error of eager torch is not more
CASES: dict[str, tuple[dict[str, Any], float, float]] = {
    "powlu": ({"name": "powlu"}, 8, 0.51),
    "powlu_half": ({"name": "powlu", "m": 0.5}, 8, 0.51),
    "powlu_steep": ({"name": "powlu", "m": 9.9}, 12, 0.51),
    "swiglu": ({"name": "swiglu"}, 4, 0.51),
    "geglu": ({"name": "geglu"}, 6, 0.51),
    "geglu_tanh": ({"name": "geglu_tanh"}, 4, 0.51),
    "quick_geglu": ({"name": "quick_geglu"}, 4, 0.51),
    "reglu": ({"name": "reglu"}, 1, 0.51),
    "swiglu_clip": ({"name": "swiglu_clip", "limit": 7.0, "alpha": 1.702, "beta": 1.0}, 4, 0.51),
    "swiglu_clip_off": ({"name": "swiglu_clip", "limit": 0}, 4, 0.51),
    "swiglu_clip_post": ({"name": "swiglu_clip_post", "limit": 4.0}, 4, 0.51),
    "situ_glu": ({"name": "situ_glu"}, 6, 0.51),
    "fatreglu": ({"name": "fatreglu", "t": 0.5}, 1, 0.51),
    "relu": ({"name": "relu"}, 1, 0.51),
    "relu2": ({"name": "relu2"}, 1, 0.51),
    "gelu": ({"name": "gelu"}, 6, 0.51),
    "silu": ({"name": "silu"}, 4, 0.51),
    "elu": ({"name": "elu"}, 2, 0.51),
    "selu": ({"name": "selu"}, 3, 0.51),
    "leaky_relu": ({"name": "leaky_relu", "s": 0.25}, 1, 0.51),
    "polyrelu": ({"name": "polyrelu", "a0": 0.125}, 4, 0.51),
    "crrelu": ({"name": "crrelu", "epsilon": 0.5}, 4, 0.51),
    "series_gelu": ({"name": "series", "rho": "gelu", "n": 3, "a": [1, 0.5, -2], "b": [0, 1, 0.25]}, 12, 0.51),
    "series_relu": ({"name": "series", "rho": "relu", "n": 2, "a": [1, -0.5], "b": [0.5, 1]}, 4, 0.51),
    "series_silu": ({"name": "series", "rho": "silu", "n": 1, "a": [1.5], "b": [-0.5]}, 4, 0.51),
    "series_tanh": ({"name": "series", "rho": "tanh", "n": 2, "a": [1, 2], "b": [0, -1]}, 4, 0.51),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def resolved(case: str) -> ResolvedActivation:
    return resolve(CASES[case][0])


def arguments(case: str, device: str = "cpu") -> tuple[Tensor | None, str, list[float]]:
    """scalars, name and params as the operators take them."""
    found = resolved(case)
    scalars = torch.tensor(found.initial_scalars(), device=device) if found.activation.learnable else None
    return scalars, found.activation.name, found.kernel_params(0)


def grid(dtype: torch.dtype) -> Tensor:
    """Finite numbers of every size and sign, fine where the functions bend, on both sides of every limit."""
    fine = torch.linspace(-16, 16, 1281, dtype=torch.float64)
    sizes = 10.0 ** torch.arange(-45, 31, 0.5, dtype=torch.float64)
    coarse = torch.linspace(16, 120, 209, dtype=torch.float64)
    limits = torch.tensor([0.5, 4.0, 7.0, 4.0 + 4.0 * math.exp(-4.07), 2.0**-126, 65504.0], dtype=dtype)
    around = [torch.nextafter(limits, limits * 0), limits, torch.nextafter(limits, limits * 2)]
    numbers = torch.cat([fine.to(dtype), *(part.to(dtype) for part in (sizes, -sizes, coarse, -coarse))])
    numbers = torch.cat([numbers, *around, *(-part for part in around), torch.tensor([0.0, -0.0], dtype=dtype)])
    return numbers[numbers.isfinite()]


def rows(case: str, dtype: torch.dtype) -> Tensor:
    """[T, H]: the grid as gate, each row with another up; without a gate one row."""
    gate = grid(dtype)
    if not resolved(case).activation.gated:
        return gate[None]
    up = torch.tensor([1.0, -0.37, 3.99, 4.0, 4.01, -7.0, -7.1, 1e-30, 1e30, 100.0, 1e-40, 0.0]).to(dtype)
    up = up[up.isfinite()]
    return torch.cat([gate.expand(len(up), -1), up[:, None].expand(-1, len(gate))], dim=1)


def _sech2(z: Tensor) -> Tensor:
    e = (-2 * z.abs()).exp()
    return 4 * e / (1 + e) ** 2


def _situ_slopes(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = 4 * (g / 4).tanh(), 25 * (u / 25).tanh()
    sigma = g.sigmoid()
    return sigma * (_sech2(g / 4) + gate * (-g).sigmoid()) * up, gate * sigma * _sech2(u / 25)


# autograd takes the derivatives of tanh and expm1 from their results, which loses the tails in float64 too
SLOPES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "elu": lambda x: (torch.where(x > 0, 1.0, x.exp()),),
    "selu": lambda x: (1.0507009873554805 * torch.where(x > 0, 1.0, 1.6732632423543772 * x.exp()),),
    "series_tanh": lambda x: (_sech2(x) + 2 * _sech2(2 * x - 1),),
    "situ_glu": _situ_slopes,
}


def evaluate(case: str, x: Tensor, dy: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """phi and dx by the registry's math and autograd in another dtype."""
    found = resolved(case)
    x = x.to(wide).requires_grad_()
    scalars = torch.tensor(found.initial_scalars(), dtype=wide) if found.activation.learnable else None
    y = phi(found.activation, x, found.for_layer(0), scalars)
    (dx,) = torch.autograd.grad(y, x, dy.to(wide))
    if case in SLOPES and wide == torch.float64:
        inputs = x.detach().chunk(2, dim=-1) if found.activation.gated else (x.detach(),)
        dx = torch.cat([dy.double() * slope for slope in SLOPES[case](*inputs)], dim=-1)
    return y.detach(), dx.detach()


@functools.cache
def truth(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """x and dy of the dtype; y and dx in float64; y and dx as eager torch has them, in fp32 and then rounded."""
    x = rows(case, dtype)
    width = x.shape[-1] // 2 if resolved(case).activation.gated else x.shape[-1]
    dy = torch.tensor([1.0, -0.75]).to(dtype).repeat(width)[:width].expand(x.shape[0], -1)
    eager = tuple(part.to(dtype) for part in evaluate(case, x, dy, torch.float32))
    return x, dy, evaluate(case, x, dy, torch.float64), eager


def bands(gate: Tensor) -> Tensor:
    """An ordered index for each number: 1/8 wide up to 16, 1 up to 128, a quarter of an octave beyond and below 1/8."""
    size = gate.double().abs()
    octave = (size.clamp(min=1e-50).log2() * 4).floor()
    index = torch.where(size < 128, 2000 + size.floor(), 4000 + octave)
    index = torch.where(size < 16, 1000 + (size * 8).floor(), index)
    index = torch.where(size < 0.125, 1000 + octave, index)
    return torch.where(gate > 0, index, -index).long()


def ulps(got: Tensor, expected: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Largest error in each band and row, in ulps of the largest expected number there and in the bands beside it.

    Returns that and the largest numbers, `[rows, bands]`. What overflows the dtype in truth counts as no error where it
    is infinite (or just not) here too. Nor does what one fp32 denormal makes of the gate's function, which is
    multiplied by gate and up.
    """
    info = torch.finfo(got.dtype)
    over = expected.abs() > info.max
    assert (got.double().abs() >= info.max)[over].all(), "an overflow is missing"
    denormal = 2.0**-149 * (2 + gate.double().abs()) * (1 + up.double().abs())
    error = ((got.double() - expected).abs() - denormal).clamp(min=0.0).masked_fill(over, 0.0)
    assert not error.isnan().any(), "NaN where there should be none"
    _, index = bands(gate).unique(return_inverse=True)
    index = index.expand_as(error)
    zeros = torch.zeros(error.shape[0], int(index.max()) + 1, dtype=torch.float64)
    worst = zeros.scatter_reduce(1, index, error, "amax")
    largest = zeros.scatter_reduce(1, index, expected.abs().masked_fill(over, 0.0), "amax")
    largest = torch.nn.functional.max_pool1d(largest, 5, stride=1, padding=2)
    exponent = torch.frexp(largest.clamp(min=info.tiny))[1] - 1
    return worst / torch.ldexp(torch.full_like(largest, info.eps), exponent), largest
