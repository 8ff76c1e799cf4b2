"""RMSNorm that megatron-core's specs can place anywhere, sequence parallelism included."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` to the same shape and dtype."""
        return F.rms_norm(x, (self.hidden_size,), None, self.eps) * self.weight
