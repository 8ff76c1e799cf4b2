"""Reference math of every activation of the registry, in plain torch.

Shape legend: T: tokens (any leading dimensions), F: width of the FFN. gate_TF and up_TF are the two halves of fc1's
output, x_TF the output of an un-gated fc1.

All math runs in fp32, whatever the storage type (float64 stays float64), and the result has the input's dtype.
Autograd goes through every function without a NaN at any finite input. Parameters have no defaults here: those stand
in the registry. A limit that is off arrives as infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def powlu(gate_TF: Tensor, up_TF: Tensor, *, m: float) -> Tensor:
    """f(g) * u with f(x) = x^(m/(sqrt(x)+1)) sigmoid(x) for x > 0, SiLU(x) else (arXiv 2605.25704)."""
    g_TF, u_TF = _wide(gate_TF), _wide(up_TF)
    positive_TF = g_TF > 0
    # `where` differentiates the branch that it does not select too, so that one must be finite; and below the smallest
    # normal number the derivative of the logarithm overflows
    tiny = torch.finfo(g_TF.dtype).tiny
    safe_TF = torch.where(positive_TF, g_TF, 1.0).clamp(min=tiny)
    exponent_TF = m / (safe_TF.sqrt() + 1)
    power_TF = torch.exp2(exponent_TF * torch.log2(safe_TF))
    f_TF = torch.where(positive_TF, power_TF, g_TF) * torch.sigmoid(g_TF)
    return (f_TF * u_TF).to(gate_TF.dtype)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """SiLU(g) * u (arXiv 2002.05202)."""
    g_TF, u_TF = _wide(gate_TF), _wide(up_TF)
    return (g_TF * torch.sigmoid(g_TF) * u_TF).to(gate_TF.dtype)


def swiglu_clip(gate_TF: Tensor, up_TF: Tensor, *, limit: float, alpha: float, beta: float) -> Tensor:
    """g' sigmoid(alpha g') (u' + beta), g' = min(g, limit), u' = clip(u, -limit, limit): clamped before the SiLU."""
    # the gradient is 1 on the limit itself
    g_TF = _wide(gate_TF).clamp(max=limit)
    u_TF = _wide(up_TF).clamp(min=-limit, max=limit)
    return (g_TF * torch.sigmoid(alpha * g_TF) * (u_TF + beta)).to(gate_TF.dtype)


def gelu(x_TF: Tensor) -> Tensor:
    """x Phi(x), the exact GELU (arXiv 1606.08415)."""
    wide_TF = _wide(x_TF)
    # erfc keeps the relative accuracy of the left tail, where 1 + erf cancels
    return (0.5 * wide_TF * torch.erfc(wide_TF * -math.sqrt(0.5))).to(x_TF.dtype)


def relu2(x_TF: Tensor) -> Tensor:
    """max(0, x)^2 (arXiv 2109.08668)."""
    return _wide(x_TF).relu().square().to(x_TF.dtype)


REFERENCE: dict[str, Callable[..., Tensor]] = {
    "powlu": powlu,
    "swiglu": swiglu,
    "swiglu_clip": swiglu_clip,
    "gelu": gelu,
    "relu2": relu2,
}
