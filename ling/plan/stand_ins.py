"""Stand-ins on the meta device for the modules that read values or have kernels for GPUs only.

megatron-core's own token dispatcher reads the counts of the router's choice on the host, which tensors without data do
not have; here every expert gets the same number of tokens.
"""

# T: tokens of this rank, K: experts per token, R: rows that reach this rank's experts, H: hidden size

from __future__ import annotations

from typing import Any

import torch


class UniformDispatcher:
    """Moves shapes as the all-to-all dispatcher does under uniform routing: a rank receives as many rows as it sends.

    Args:
        top_k: experts per token.
        local_experts: experts of this rank.
        expert_tensor_parallel: ranks that share each expert, whose rows are gathered.
    """

    shared_experts = None

    def __init__(self, top_k: int, local_experts: int, expert_tensor_parallel: int) -> None:
        self.top_k, self.local_experts, self.etp = top_k, local_experts, expert_tensor_parallel
        self.shape: torch.Size = torch.Size()

    def dispatch_preprocess(
        self, hidden: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[S, B, H]` to `[T·K, H]`, sorted by expert, and the routing weight of each row."""
        self.shape = hidden.shape
        flat_TH = hidden.reshape(-1, hidden.shape[-1])
        self.rows = torch.empty(flat_TH.shape[0] * self.top_k, dtype=torch.int64, device=hidden.device)
        return flat_TH.index_select(0, self.rows), probs.reshape(-1).index_select(0, self.rows)

    def token_dispatch(self, hidden: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """To the ranks of the experts: as many rows come as go."""
        return hidden.clone(), probs.clone()

    def dispatch_postprocess(
        self, hidden: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows gathered over the expert-tensor-parallel ranks, sorted by expert; rows of each expert; weights `[R]`."""
        counts = torch.empty(self.local_experts, dtype=torch.int64, device=hidden.device)
        return torch.cat([hidden] * self.etp), counts, torch.cat([probs] * self.etp)

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """megatron-core 0.19 asks for buffers that experts write into: there are none."""
        return None, None

    def combine_preprocess(self, hidden: torch.Tensor) -> torch.Tensor:
        """The reverse of `dispatch_postprocess`."""
        return hidden.chunk(self.etp)[0].clone()

    def token_combine(self, hidden: torch.Tensor) -> torch.Tensor:
        """Back to the ranks of the tokens."""
        return hidden.clone()

    def combine_postprocess(self, hidden: torch.Tensor) -> torch.Tensor:
        """Sum of a token's rows, `[S, B, H]`."""
        tokens = hidden.shape[0] // self.top_k
        rows_RH = self.rows[:, None].expand(-1, hidden.shape[-1])
        out_TH = hidden.new_zeros(tokens, hidden.shape[-1]).scatter_add(0, rows_RH, hidden)
        return out_TH.reshape(self.shape)


def use_uniform_routing(chunk: Any, etp: int) -> int:
    """Put the stand-in into every MoE layer of a built chunk; returns how many there are."""
    layers = [module for module in chunk.modules() if hasattr(module, "token_dispatcher")]
    for layer in layers:
        layer.token_dispatcher = UniformDispatcher(layer.config.moe_router_topk, layer.num_local_experts, etp)
    return len(layers)


class FlashShapes(torch.nn.Module):
    """Stand-in for core attention on the meta device: the output's shape, and what a flash kernel saves."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """`[S, B, N, D]` queries, `[S, B, G, D]` keys and values, to `[S, B, N·D]`."""
        return _FlashShapes.apply(query, key, value).flatten(2)


class _FlashShapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        statistic = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, statistic)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def grouped_shapes(x_TK: torch.Tensor, weight_ENK: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Stand-in for the experts' grouped products: `[T, N]`, and what they save."""
    return _GroupedShapes.apply(x_TK, weight_ENK)


class _GroupedShapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: torch.Tensor, weight_ENK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TK, weight_ENK)
        return x_TK.new_empty(x_TK.shape[0], weight_ENK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)
