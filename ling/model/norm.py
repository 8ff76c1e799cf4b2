"""RMSNorm that megatron-core's specs can place anywhere, sequence parallelism included."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """`x / rms(x)` with statistics in fp32, cast to the dtype of `x`, then times the weight (Ling 2.0).

    Args:
        config: megatron-core's TransformerConfig.
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # megatron-core sums the gradients of parameters with this mark over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same shape and dtype."""
        if x.is_cuda:  # one fused kernel each way
            return F.rms_norm(x, (self.hidden_size,), None, self.eps) * self.weight
        return _NormAndScale.apply(x, self.weight, self.eps)


class _NormAndScale(torch.autograd.Function):
    """The norm as one node of the graph.

    Two thirds of the time of torch's composite on the CPU; and its gradient is one term of the sum that reaches `x`, so
    that the sum rounds the same whether the norm is recomputed or not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad, normed = grads[0].float(), x.float() * scale
        d_weight = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        d_normed = grad * weight.float()
        d_x = torch.addcmul(d_normed, normed, (d_normed * normed).mean(-1, keepdim=True), value=-1.0) * scale
        return d_x.to(x.dtype), d_weight, None
