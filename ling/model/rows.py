"""Row statistics of an FFN whose width is split over ranks, for row-wise activations."""

# T: tokens (any leading dimensions), F: part of the width on this rank, K: largest elements

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class ShardedRows:
    """As `ling.activations.reference.WholeRows`, for rows that are split over the ranks of a group, in rank order.

    All ranks of the group must ask the same things in the same order, in the backward pass too.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, as a new tensor; without a gradient."""
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors of one shape in rank order, `[ranks, ...]`; without a gradient."""
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(parts.unbind(0)), x.contiguous(), group=self.group)
        return parts

    def mean(self, x_TF: torch.Tensor) -> torch.Tensor:
        """The mean over each whole row, `[..., 1]`."""
        return _SumOver.apply(x_TF.sum(-1, keepdim=True), self.group) / (x_TF.shape[-1] * self.size)

    @torch.no_grad()
    def largest(self, x_TF: torch.Tensor, k: int) -> torch.Tensor:
        """Whether an element is among the k largest of its whole row, `[..., F]`; of equal ones the first by index."""
        own_TK = x_TF.topk(min(k, x_TF.shape[-1]), dim=-1).values
        top_TK = torch.cat(self.gather(own_TK).unbind(0), dim=-1).topk(k, dim=-1).values
        least_T1 = top_TK[..., -1:]
        is_tie_TF = x_TF == least_T1
        ties = self.gather(is_tie_TF.sum(-1, keepdim=True))
        wanted_T1 = k - (top_TK > least_T1).sum(-1, keepdim=True) - ties[: self.rank].sum(0)
        return (x_TF > least_T1) | (is_tie_TF & (is_tie_TF.cumsum(-1) <= wanted_T1))


class _SumOver(torch.autograd.Function):
    """Sum over the ranks of a group, each of which goes on to a part of the loss."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
