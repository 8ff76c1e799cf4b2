"""Ling's router: sigmoid scores in fp32, an expert bias that no gradient reaches, group-limited top-k.

Sources: Ling 2.0 (arXiv 2510.22115); DeepSeek-V3 (arXiv 2412.19437) for bias and groups; ST-MoE (arXiv 2202.08906) for
the z-loss.
"""

# T: tokens, E: experts, K: experts per token, M: groups of experts, S: tokens of a sequence, B: sequences

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from ling.parallel import groups


class LingRouter(TopKRouter):
    """Chooses the experts of each token and their weights.

    Losses (z-loss and sequence-wise balance loss) reach the gradient through megatron-core's `MoEAuxLossAutoScaler`;
    all gradients are divided by the tokens of the global batch at the end of a step, so a loss that is a mean over
    tokens is handed over times its tokens. Each tensor-parallel rank hands over the share of its own tokens, and those
    are summed.
    """

    def __init__(self, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        model = config.ling
        self.num_groups, self.group_topk = model.moe_router_num_groups, model.moe_router_group_topk
        self.scaling_factor = model.moe_router_topk_scaling_factor
        self.z_loss_coeff, self.balance_coeff = model.moe_z_loss_coeff, model.moe_aux_loss_coeff
        self.bias_update_rate = model.moe_router_bias_update_rate
        self.bias_centering = model.moe_router_bias_centering
        self.has_bias = model.moe_router_enable_expert_bias
        if self.has_bias:
            del self.expert_bias, self.local_tokens_per_expert  # placeholders of the base class
            device = self.weight.device
            self.register_buffer("expert_bias", torch.zeros(model.num_moe_experts, device=device))
            load = torch.zeros(model.num_moe_experts, device=device)
            self.register_buffer("local_tokens_per_expert", load, persistent=False)
        self.last_choice: torch.Tensor | None = None
        self.record_choice = False

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LingRouter:
        """Move with the model, but keep the bias and the counters in fp32 whatever the model is cast to."""
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def _maintain_float32_expert_bias(self) -> None:
        """Nothing to do: `_apply` keeps it."""

    def forward(self, input: torch.Tensor, padding_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Route.

        Args:
            input: `[S, B, hidden]`.

        Returns:
            `[T, E]` fp32 routing weights (zero where not chosen) and `[T, E]` bool choice, T = S·B, sequence-major.
        """
        # fp32 copies of both factors, as Ling does, whatever the model's dtype.
        logits_SBE = F.linear(input.float(), self.weight.float())
        seq, batch, num_experts = logits_SBE.shape
        logits_TE = self._with_z_loss(logits_SBE.reshape(-1, num_experts))
        scores_TE = torch.sigmoid(logits_TE)
        chosen_TK = self.choose(scores_TE.detach())
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, chosen_TK, True)
        weights_TK = scores_TE.gather(1, chosen_TK)
        if self.topk > 1:  # a single weight is not normalised: it would always be 1
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * self.scaling_factor
        weights_TE = torch.zeros_like(scores_TE).scatter(1, chosen_TK, weights_TK)
        if self.balance_coeff and self.training and torch.is_grad_enabled():
            weights_TE = self._with_balance_loss(weights_TE, scores_TE, chosen_TE, seq, batch)
        if self.has_bias and torch.is_grad_enabled():  # not in evaluation, and not again when a layer is recomputed
            with torch.no_grad():
                self.local_tokens_per_expert += chosen_TE.sum(0)
        if self.record_choice:
            self.last_choice = chosen_TK.detach()
        return weights_TE, chosen_TE

    @torch.no_grad()
    def choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """The experts of each token, `[T, K]`: top-k of score plus bias among the experts of the best groups.

        A group's score is the sum of its two best experts' (Ling 2.0 and DeepSeek-V3).
        """
        selection_TE = scores_TE + self.expert_bias if self.has_bias else scores_TE
        if self.num_groups is not None and self.group_topk < self.num_groups:
            by_group_TMe = selection_TE.view(len(selection_TE), self.num_groups, -1)
            best_two = min(2, by_group_TMe.shape[-1])
            group_score_TM = by_group_TMe.topk(best_two, dim=-1).values.sum(-1)
            group_TM = torch.zeros_like(group_score_TM, dtype=torch.bool)
            group_TM.scatter_(1, group_score_TM.topk(self.group_topk, dim=-1).indices, True)
            selection_TE = by_group_TMe.masked_fill(~group_TM[..., None], float("-inf")).flatten(1)
        return selection_TE.topk(self.topk, dim=-1).indices

    def _with_z_loss(self, logits_TE: torch.Tensor) -> torch.Tensor:
        if not (self.z_loss_coeff and self.training and torch.is_grad_enabled()):
            return logits_TE
        z_loss_sum = self.z_loss_coeff * torch.logsumexp(logits_TE, dim=-1).square().sum()
        return MoEAuxLossAutoScaler.apply(logits_TE, z_loss_sum)

    def _with_balance_loss(
        self, weights_TE: torch.Tensor, scores_TE: torch.Tensor, chosen_TE: torch.Tensor, seq: int, batch: int
    ) -> torch.Tensor:
        """Sequence-wise balance loss: mean over sequences of E/(K·S)·Σ_e load_e · mean_S(score_e / Σ score).

        The load counts the choice without the bias. With sequence parallelism a sequence is spread over the
        tensor-parallel ranks: its loads are summed over them, its scores through the gradient's own sum.
        """
        load_choice_TK = scores_TE.detach().topk(self.topk, dim=-1).indices
        load_BE = torch.zeros_like(scores_TE).scatter_(1, load_choice_TK, 1.0).view(seq, batch, -1).sum(0)
        seq_total = seq
        if self.config.sequence_parallel:
            dist.all_reduce(load_BE, group=self.tp_group)
            seq_total = seq * self.tp_group.size()
        share_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        share_BE = share_TE.view(seq, batch, -1).sum(0)
        factor = scores_TE.shape[1] / (self.topk * seq_total * seq_total)
        loss_sum = self.balance_coeff * seq_total * factor * (load_BE * share_BE).sum()
        return MoEAuxLossAutoScaler.apply(weights_TE, loss_sum)


def routers(model_chunks: list[torch.nn.Module]) -> Iterator[LingRouter]:
    """All routers of this rank's model chunks, in the order of the layers."""
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, LingRouter):
                yield module


@torch.no_grad()
def update_expert_bias(model_chunks: list[torch.nn.Module]) -> None:
    """After a step: bias += rate · sign(mean load − load), kept zero-mean, and the load counters back to zero.

    The load is summed over all ranks that saw tokens of the same layer. `update` centring subtracts the mean of the
    update, `bias` the mean of the bias itself, `none` nothing (DeepSeek-V3).
    """
    with_bias = [router for router in routers(model_chunks) if router.has_bias]
    if not with_bias:
        return
    load_LE = torch.stack([router.local_tokens_per_expert for router in with_bias])
    dist.all_reduce(load_LE, group=groups.tensor_and_data().group)
    for router, load_E in zip(with_bias, load_LE, strict=True):
        update_E = router.bias_update_rate * torch.sign(load_E.mean() - load_E)
        if router.bias_centering == "update":
            update_E = update_E - update_E.mean()
        router.expert_bias += update_E
        if router.bias_centering == "bias":
            router.expert_bias -= router.expert_bias.mean()
        router.local_tokens_per_expert.zero_()
