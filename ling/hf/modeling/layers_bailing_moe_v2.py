"""The layers of Ling 2.0 models: norm, activation, FFN, router, experts, attention, MTP layer. Needs torch alone.

Tensor names are those of inclusionAI's Ling 2.0. Tables that follow from the configuration are computed in the forward
pass, so that no buffer can be lost.
"""

# B: sequences, S: tokens of a sequence, P: tokens in the cache, H: query heads, G: key/value heads, D: size of a head,
# T = B*S, K: experts of a token, E: experts

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_bailing_moe_v2 import BailingMoeV2Config

ACTIVATIONS: dict[str, Any] = {}
"""Rows of the activation file of each model that is loaded, by `hidden_act`."""


class BailingMoeV2RMSNorm(nn.Module):
    """x / rms(x) with statistics in fp32, cast to the dtype of x, then times the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class BailingMoeV2Activation(nn.Module):
    """The FFN activation that the configuration names for a kind of FFN, computed in fp32."""

    def __init__(self, config: BailingMoeV2Config, kind: str, layer: int) -> None:
        super().__init__()
        name, prefix = config.activation(kind)
        if name not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"unknown {prefix}hidden_act {name!r}: this model comes with {known}")
        self.row = ACTIVATIONS[name]
        layer = min(layer, config.num_hidden_layers - 1)  # MTP layers are like the last one

        def setting(key: str) -> Any:
            value = getattr(config, f"{prefix}{self.row.name}_{key}")
            value = value[layer] if isinstance(value, (list, tuple)) and key not in self.row.learnable else value
            return math.inf if value is None else value

        self.params = {key: setting(key) for key in self.row.params}
        initial = [setting(key) for key in self.row.learnable]
        self.initial = [x for value in initial for x in (value if isinstance(value, (list, tuple)) else [value])]
        learn = getattr(config, f"{prefix}{self.row.name}_learn", "fixed")
        learns = bool(self.initial) and learn != "fixed"
        scalars = nn.Parameter(torch.tensor(self.initial, dtype=torch.float32)) if learns else None
        self.register_parameter("scalars", scalars)

    def forward(self, *halves: Tensor) -> Tensor:
        dtype = torch.promote_types(halves[0].dtype, torch.float32)
        named = dict(self.params)
        if self.row.learnable:
            scalars = self.scalars
            if scalars is None:
                scalars = torch.tensor(self.initial, device=halves[0].device)
            named["scalars"] = scalars.to(dtype)
        if self.row.rowwise:
            named["rows"] = WholeRows()
        return self.row.math(*(half.to(dtype) for half in halves), **named).to(halves[0].dtype)


class WholeRows:
    """What row-wise activations ask of the rows `[..., F]`."""

    def mean(self, x: Tensor) -> Tensor:
        """The mean over each row, `[..., 1]`."""
        return x.mean(-1, keepdim=True)

    def largest(self, x: Tensor, k: int) -> Tensor:
        """Whether an element is among the k largest of its row; of equal ones the first by index are."""
        return x.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < k


class BailingMoeV2MLP(nn.Module):
    """down(activation(gate, up)), or down(activation(up)) where the activation has no gate.

    Without a `kind` the caller hands over the activation: the experts of a layer share one.
    """

    def __init__(
        self, config: BailingMoeV2Config, width: int, gated: bool, kind: str | None = None, layer: int = 0
    ) -> None:
        super().__init__()
        if gated:
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.gated = gated
        if kind is not None:
            self.act_fn = BailingMoeV2Activation(config, kind, layer)

    def forward(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        activation = self.act_fn if activation is None else activation
        up = self.up_proj(x)
        return self.down_proj(activation(self.gate_proj(x), up) if self.gated else activation(up))


def _gated(config: BailingMoeV2Config, kind: str) -> bool:
    row = ACTIVATIONS.get(config.activation(kind)[0])
    return row is None or row.gated  # an unknown name is refused where the activation is built


class BailingMoeV2Gate(nn.Module):
    """The router: sigmoid scores in fp32, a bias on the choice alone, groups scored by their two best experts."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.top_k, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.groups, self.group_topk = config.n_group or 1, config.topk_group or 1
        if config.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        else:
            self.expert_bias = None

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen experts `[T, K]`, their weights `[T, K]` fp32, and the logits `[T, E]`."""
        logits_TE = F.linear(x_TH.float(), self.weight.float())
        scores_TE = logits_TE.sigmoid()
        choice_TE = scores_TE.detach()
        if self.expert_bias is not None:
            choice_TE = choice_TE + self.expert_bias.float()
        if self.group_topk < self.groups:
            by_group = choice_TE.view(len(choice_TE), self.groups, -1)
            best_two = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(best_two, dtype=torch.bool)
            kept.scatter_(1, best_two.topk(self.group_topk, dim=-1).indices, True)
            choice_TE = by_group.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        chosen_TK = choice_TE.topk(self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, chosen_TK)
        if self.top_k > 1:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return chosen_TK, weights_TK * self.scaling, logits_TE


class BailingMoeV2SparseMoeBlock(nn.Module):
    """The chosen experts, weighted and summed in fp32, plus the shared experts."""

    def __init__(self, config: BailingMoeV2Config, layer: int) -> None:
        super().__init__()
        self.gate = BailingMoeV2Gate(config)
        self.act_fn = BailingMoeV2Activation(config, "routed", layer)
        width, gated = config.moe_intermediate_size, _gated(config, "routed")
        self.experts = nn.ModuleList(BailingMoeV2MLP(config, width, gated) for _ in range(config.num_experts))
        shared = config.shared_intermediate_size
        if shared:
            self.shared_experts = BailingMoeV2MLP(config, shared, _gated(config, "shared"), "shared", layer)
        self.has_shared = bool(shared)

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        chosen_TK, weights_TK, _ = self.gate(x_TH)
        y_TH = torch.zeros_like(x_TH, dtype=torch.promote_types(x.dtype, torch.float32))
        order = chosen_TK.flatten().argsort(stable=True)
        token, weight = order // chosen_TK.shape[1], weights_TK.flatten()[order]
        first = 0
        for expert, count in enumerate(torch.bincount(chosen_TK.flatten(), minlength=len(self.experts)).tolist()):
            if count:
                rows = slice(first, first + count)
                y = self.experts[expert](x_TH[token[rows]], self.act_fn)
                y_TH = y_TH.index_add(0, token[rows], weight[rows, None].to(y_TH.dtype) * y)
            first += count
        y = y_TH.to(x.dtype).view_as(x)
        return y + self.shared_experts(x) if self.has_shared else y


class BailingMoeV2Attention(nn.Module):
    """Grouped-query attention with RMSNorm on query and key heads before rotary embedding of part of each head."""

    def __init__(self, config: BailingMoeV2Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        rows = (self.heads + 2 * self.groups) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=False)
        self.dense = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        if config.use_qk_norm:
            self.query_layernorm = BailingMoeV2RMSNorm(self.head_dim, config.rms_norm_eps)
            self.key_layernorm = BailingMoeV2RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> tuple[Any, Any]:
        """Output `[B, S, hidden]`, and the attention weights `[B, H, S, P + S]` with eager attention."""
        qkv = self.query_key_value(x).unflatten(-1, (self.heads + 2 * self.groups, self.head_dim))
        q, k, v = qkv.split((self.heads, self.groups, self.groups), dim=2)
        if self.config.use_qk_norm:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        if cache is not None:
            past = int(cache.get_seq_length(self.layer_idx))
            end = past + q.shape[2]
            places = torch.arange(past, end, device=k.device)
            k, v = cache.update(k, v, self.layer_idx, {"cache_position": places})
            k, v = k[:, :, :end], v[:, :, :end]  # without the empty places of a static cache
            mask = mask if mask is None else mask[..., :end]
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        if self.config._attn_implementation == "eager":
            y, weights = _eager_attention(q, k, v, mask)
        else:
            y, weights = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and q.shape[2] > 1), None
        return self.dense(y.transpose(1, 2).flatten(2)), weights


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).float()
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(q.dtype)
    return weights @ v, weights


def rotary_tables(config: BailingMoeV2Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, 1, S, rotary_dim]`, computed in fp32."""
    channels = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions.device)
    angle = positions[:, None, :, None].float() * config.rope_theta ** (-channels / config.rotary_dim)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """NeoX style: channel i < r/2 turns with channel i + r/2; the channels from r on stay."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


class BailingMoeV2DecoderLayer(nn.Module):
    """Pre-norm: attention, then the FFN."""

    def __init__(self, config: BailingMoeV2Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = BailingMoeV2Attention(config, layer)
        self.post_attention_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.is_moe_layer(layer):
            self.mlp: nn.Module = BailingMoeV2SparseMoeBlock(config, layer)
        else:
            self.mlp = BailingMoeV2MLP(config, config.intermediate_size, _gated(config, "dense"), "dense", layer)

    def forward(self, x: Tensor, rotary: Any, mask: Tensor | None, cache: Any = None) -> tuple[Tensor, Any]:
        attended, weights = self.attention(self.input_layernorm(x), rotary, mask, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), weights


class BailingMoeV2MTPLayer(BailingMoeV2DecoderLayer):
    """Multi-token prediction: a decoder layer on the next token's embedding and the decoder's normed output."""

    def __init__(self, config: BailingMoeV2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.final_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def predict(self, next_embedding: Tensor, hidden: Tensor, rotary: Any, mask: Tensor | None) -> Tensor:
        """What the output layer turns into the logits of the token after the next, `[B, S, hidden]`."""
        x = self.eh_proj(torch.cat([self.enorm(next_embedding), self.hnorm(hidden)], dim=-1))
        return self.final_layernorm(self(x, rotary, mask)[0])
