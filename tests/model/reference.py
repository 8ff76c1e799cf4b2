"""The Ling decoder in plain PyTorch: what the framework's model must compute, written apart from it and for clarity.

It imports neither ling nor megatron-core. Weights come as a flat dict with the framework's names and full shapes (one
rank): `linear_qkv` rows are interleaved per group [q .. q k v], fc1 rows are [gate | up], `experts.weight1` is
[E, fc1, h] and `experts.weight2` is [E, h, F]; `<layer>.mlp.router.expert_bias` [E] may be left out. Everything runs in
the dtype of the weights (float64 for a ground truth); RMSNorm statistics, router and losses in fp32 at least.

Shapes: B batch, S sequence, h hidden, H query heads, G key/value heads, d head size, E experts, K experts per token,
N = B*S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]  # [.., fc1 width] -> [.., ffn width]


@dataclass
class ReferenceSizes:
    """Sizes and constants of a model.

    An activation is a name of ACTIVATIONS, a pair (name, parameters), or a callable on fc1's output.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    first_k_dense_replace: int = 0
    num_moe_experts: int | None = None
    moe_router_topk: int = 2
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_topk_scaling_factor: float = 1.0
    mtp_num_layers: int = 0
    rotary_percent: float = 0.5
    rotary_base: float = 10000.0
    qk_layernorm: bool = True
    layernorm_epsilon: float = 1e-6
    dense_activation: str | tuple[str, dict] | Activation = "powlu"
    shared_activation: str | tuple[str, dict] | Activation = "powlu"
    routed_activation: str | tuple[str, dict] | Activation = "powlu"
    mtp_loss_scaling_factor: float = 0.1
    moe_z_loss_coeff: float = 0.0
    moe_aux_loss_coeff: float = 0.0


@dataclass
class ReferenceOutput:
    """What a forward pass gives. Lists over MoE layers end with the MTP layer's entry if that is a MoE layer.

    loss, mtp_loss: mean over the tokens that count, None without labels. total_loss: all losses with their coefficients
    (those of the routers summed over layers), the number whose gradient training follows.
    hidden_per_layer: the residual stream [B, S, h] after each decoder layer, before the final norm.
    chosen_experts_per_layer: [B, S, K] in descending order of selection score.
    z_loss, balance_loss: one number per MoE layer, without their coefficients.
    """

    logits: Tensor
    mtp_logits: Tensor | None
    loss: Tensor | None
    mtp_loss: Tensor | None
    total_loss: Tensor | None
    hidden_per_layer: list[Tensor]
    chosen_experts_per_layer: list[Tensor]
    z_loss: Tensor
    balance_loss: Tensor


@dataclass
class _RouterRecord:
    chosen: list[Tensor] = field(default_factory=list)
    z_loss: list[Tensor] = field(default_factory=list)
    balance_loss: list[Tensor] = field(default_factory=list)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is when that is finer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- activations: fc1's output ([gate | up] for the gated ones) -> fc2's input


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), without overflow."""
    return torch.exp(-torch.logaddexp(torch.zeros_like(x), -x))


def powlu_gate(x: Tensor, m: float = 3.0) -> Tensor:
    """f(x) = x^(m / (sqrt(x) + 1)) sigmoid(x) for x > 0, x sigmoid(x) else."""
    positive = x > 0
    safe = torch.where(
        positive, x, torch.ones_like(x)
    )  # no NaN from the branch that is not taken, in the gradient either
    power = torch.exp(m / (safe.sqrt() + 1) * safe.log())
    return torch.where(positive, power, x) * sigmoid(x)


def powlu(x: Tensor, m: float = 3.0) -> Tensor:
    """PowLU FFN: up * f(gate)."""
    gate, up = x.chunk(2, dim=-1)
    return powlu_gate(gate, m) * up


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) * up."""
    gate, up = x.chunk(2, dim=-1)
    return gate * sigmoid(gate) * up


def swiglu_clip(x: Tensor, limit: float = 7.0, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Clamp before SiLU: gate from above, up from both sides; at the limit itself the gradient passes."""
    gate, up = x.chunk(2, dim=-1)
    gate = torch.where(gate <= limit, gate, torch.full_like(gate, limit))
    up = torch.where(up.abs() <= limit, up, limit * torch.sign(up))
    return gate * sigmoid(alpha * gate) * (up + beta)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), with the exact normal distribution function."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2.0)))


def relu2(x: Tensor) -> Tensor:
    """max(0, x)^2."""
    return (x * (x > 0)) ** 2


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "powlu": powlu,
    "swiglu": swiglu,
    "swiglu_clip": swiglu_clip,
    "gelu": gelu,
    "relu2": relu2,
}
GATED = {"powlu": True, "swiglu": True, "swiglu_clip": True, "gelu": False, "relu2": False}


def activation_function(spec: str | tuple[str, dict] | Activation) -> Activation:
    """The callable that `spec` means."""
    if callable(spec):
        return spec
    name, parameters = (spec, {}) if isinstance(spec, str) else spec
    return lambda x: ACTIVATIONS[name](x.to(at_least_fp32(x).dtype), **parameters).to(x.dtype)


# ---- pieces


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) over the last dimension, cast to x's dtype, times the weight."""
    exact = at_least_fp32(x)
    normed = exact / torch.sqrt((exact * exact).mean(dim=-1, keepdim=True) + epsilon)
    return normed.to(x.dtype) * weight


def rotate(x: Tensor, position_ids: Tensor, rotary_dim: int, base: float) -> Tensor:
    """RoPE, NeoX style, on the first `rotary_dim` channels of each head; x [B, S, heads, d], position_ids [B, S].

    Channel i < rotary_dim/2 and channel i + rotary_dim/2 turn by position * base^(-2i / rotary_dim).
    """
    half = rotary_dim // 2
    dtype = at_least_fp32(x).dtype
    frequency = base ** (-2.0 * torch.arange(half, dtype=dtype) / rotary_dim)
    angle = (position_ids.to(dtype)[:, :, None] * frequency)[:, :, None, :]  # [B, S, 1, half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def visible(sequence_length: int, document_ids: Tensor | None) -> Tensor:
    """[B or 1, S, S]: True where the query (row) may see the key (column): not later, and of the same document."""
    index = torch.arange(sequence_length)
    mask = (index[None, :] <= index[:, None])[None]
    if document_ids is not None:
        mask = mask & (document_ids[:, :, None] == document_ids[:, None, :])
    return mask


def split_qkv(qkv: Tensor, heads: int, groups: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, (H + 2G)d], per group [q .. q k v], -> q [B, S, H, d], k and v [B, S, G, d]."""
    per_group = heads // groups
    blocks = qkv.view(*qkv.shape[:2], groups, per_group + 2, head)
    q = blocks[:, :, :, :per_group].reshape(*qkv.shape[:2], heads, head)
    return q, blocks[:, :, :, per_group], blocks[:, :, :, per_group + 1]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, S, H, d], k and v [B, S, G, d], mask [B or 1, S, S] -> [B, S, H, d]; H/G query heads share a key head."""
    per_group = q.shape[2] // k.shape[2]
    outputs = []
    for head in range(q.shape[2]):
        key, value = k[:, :, head // per_group], v[:, :, head // per_group]
        scores = q[:, :, head] @ key.transpose(1, 2) / math.sqrt(q.shape[-1])
        weights = torch.softmax(at_least_fp32(scores).masked_fill(~mask, float("-inf")), dim=-1)
        outputs.append(weights.to(value.dtype) @ value)
    return torch.stack(outputs, dim=2)


def choose_experts(selection: Tensor, topk: int, groups: int | None, group_topk: int | None) -> Tensor:
    """Indices [N, K] of the experts with the highest selection score [N, E] (= score + bias), in descending order.

    With groups: only the `group_topk` groups whose two best experts have the largest sum take part.
    """
    if groups is not None and group_topk is not None:
        grouped = selection.view(len(selection), groups, -1)
        group_score = grouped.sort(dim=-1, descending=True).values[..., :2].sum(dim=-1)
        kept = group_score.sort(dim=-1, descending=True).indices[:, :group_topk]
        allowed = (torch.arange(groups)[None, :, None] == kept[:, None, :]).any(dim=-1)
        selection = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
    return selection.sort(dim=-1, descending=True).indices[:, :topk]


def routing_weights(scores: Tensor, chosen: Tensor, factor: float) -> Tensor:
    """[N, K]: the chosen experts' scores (no bias) over their sum, times the factor; a single one is not normalised."""
    weights = scores.gather(1, chosen)
    if chosen.shape[1] > 1:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * factor


def z_loss_of(logits: Tensor) -> Tensor:
    """Mean over the tokens of logsumexp(router logits)^2."""
    return (torch.logsumexp(logits, dim=-1) ** 2).mean()


def balance_loss_of(logits: Tensor, topk: int) -> Tensor:
    """Sequence-wise balance loss of router logits [B, S, E], mean over the sequences of  E * sum_e f_e P_e.

    P_e is the mean over the sequence of score_e / sum of scores; f_e the part of the S*K choices that falls on expert e
    when each token takes the K best by score alone (neither bias nor groups).
    """
    batch, length, experts = logits.shape
    losses = []
    for sequence in range(batch):
        scores = torch.sigmoid(logits[sequence])
        share = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        best = share.sort(dim=-1, descending=True).indices[:, :topk]
        f = torch.stack([(best == e).sum() for e in range(experts)]) / (length * topk)
        losses.append(experts * (f.to(share.dtype) * share.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def next_along_sequence(x: Tensor) -> Tensor:
    """x [B, S] shifted by one, x[:, t+1] at t; 0 at the last position."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def masked_cross_entropy(logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[label] over the positions where loss_mask is not 0."""
    logits = at_least_fp32(logits)
    picked = logits.gather(-1, labels[..., None])[..., 0]
    per_token = torch.logsumexp(logits, dim=-1) - picked
    return (per_token * loss_mask).sum() / loss_mask.sum()


# ---- the model


class ReferenceModel:
    """The whole decoder; gradients flow to the tensors of `weights` that require them."""

    def __init__(self, sizes: ReferenceSizes, weights: Mapping[str, Tensor]):
        self.sizes = sizes
        self.weights = weights

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> ReferenceOutput:
        """Run tokens [B, S]; labels [B, S] are the tokens to predict, already shifted; loss_mask [B, S] is 0 or 1."""
        weights, sizes = self.weights, self.sizes
        batch, length = tokens.shape
        if position_ids is None:
            position_ids = torch.arange(length).expand(batch, length)
        mask = visible(length, document_ids)
        record = _RouterRecord()

        hidden = weights["embedding.word_embeddings.weight"][tokens]
        hidden_per_layer = []
        for layer in range(sizes.num_layers):
            hidden = self._layer(f"decoder.layers.{layer}.", hidden, mask, position_ids, record)
            hidden_per_layer.append(hidden)
        hidden = self._norm("decoder.final_layernorm", hidden)

        logits = hidden @ weights["output_layer.weight"].T
        mtp_logits = None
        if sizes.mtp_num_layers:
            assert sizes.mtp_num_layers == 1, "the reference has one MTP layer"
            mtp_logits = self._mtp(tokens, hidden, mask, position_ids, record) @ weights["output_layer.weight"].T

        loss, mtp_loss = self._losses(logits, mtp_logits, labels, loss_mask)
        z_loss = torch.stack(record.z_loss) if record.z_loss else torch.zeros(0)
        balance_loss = torch.stack(record.balance_loss) if record.balance_loss else torch.zeros(0)
        total_loss = loss
        if total_loss is not None:
            total_loss = total_loss + sizes.moe_z_loss_coeff * z_loss.sum()
            total_loss = total_loss + sizes.moe_aux_loss_coeff * balance_loss.sum()
            total_loss = total_loss if mtp_loss is None else total_loss + sizes.mtp_loss_scaling_factor * mtp_loss
        return ReferenceOutput(
            logits, mtp_logits, loss, mtp_loss, total_loss, hidden_per_layer, record.chosen, z_loss, balance_loss
        )

    def _losses(
        self, logits: Tensor, mtp_logits: Tensor | None, labels: Tensor | None, loss_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if labels is None:
            return None, None
        loss_mask = torch.ones(labels.shape) if loss_mask is None else loss_mask
        loss = masked_cross_entropy(logits, labels, loss_mask)
        if mtp_logits is None:
            return loss, None
        # position t predicts labels[t+1]; the last position has nothing to predict
        mtp_loss = masked_cross_entropy(mtp_logits, next_along_sequence(labels), next_along_sequence(loss_mask))
        return loss, mtp_loss

    def _layer(self, prefix: str, hidden: Tensor, mask: Tensor, position_ids: Tensor, record: _RouterRecord) -> Tensor:
        normed = self._norm(prefix + "input_layernorm", hidden)
        hidden = hidden + self._attention(prefix + "self_attention.", normed, mask, position_ids)
        normed = self._norm(prefix + "pre_mlp_layernorm", hidden)
        if prefix + "mlp.router.weight" in self.weights:
            return hidden + self._moe(prefix + "mlp.", normed, record)
        return hidden + self._ffn(prefix + "mlp.", normed, self.sizes.dense_activation)

    def _mtp(self, tokens: Tensor, hidden: Tensor, mask: Tensor, position_ids: Tensor, record: _RouterRecord) -> Tensor:
        """hidden: the decoder's output after its final norm. The next token may belong to the next document."""
        embedded = self.weights["embedding.word_embeddings.weight"][next_along_sequence(tokens)]
        both = torch.cat([self._norm("mtp.layers.0.enorm", embedded), self._norm("mtp.layers.0.hnorm", hidden)], dim=-1)
        hidden = both @ self.weights["mtp.layers.0.eh_proj.weight"].T
        hidden = self._layer("mtp.layers.0.transformer_layer.", hidden, mask, position_ids, record)
        return self._norm("mtp.layers.0.final_layernorm", hidden)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.weights[name + ".weight"], self.sizes.layernorm_epsilon)

    def _attention(self, prefix: str, x: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        sizes = self.sizes
        qkv = x @ self.weights[prefix + "linear_qkv.weight"].T
        q, k, v = split_qkv(qkv, sizes.num_attention_heads, sizes.num_query_groups, sizes.kv_channels)
        if sizes.qk_layernorm:
            q, k = self._norm(prefix + "q_layernorm", q), self._norm(prefix + "k_layernorm", k)
        rotary_dim = int(sizes.kv_channels * sizes.rotary_percent)
        q = rotate(q, position_ids, rotary_dim, sizes.rotary_base)
        k = rotate(k, position_ids, rotary_dim, sizes.rotary_base)
        return softmax_attention(q, k, v, mask).flatten(2) @ self.weights[prefix + "linear_proj.weight"].T

    def _ffn(self, prefix: str, x: Tensor, activation: str | tuple[str, dict] | Activation) -> Tensor:
        inner = activation_function(activation)(x @ self.weights[prefix + "linear_fc1.weight"].T)
        return inner @ self.weights[prefix + "linear_fc2.weight"].T

    def _moe(self, prefix: str, x: Tensor, record: _RouterRecord) -> Tensor:
        sizes = self.sizes
        logits = at_least_fp32(x) @ at_least_fp32(self.weights[prefix + "router.weight"]).T
        scores = torch.sigmoid(logits).flatten(0, 1)
        bias = self.weights.get(prefix + "router.expert_bias", torch.zeros(scores.shape[1]))
        chosen = choose_experts(
            scores + bias, sizes.moe_router_topk, sizes.moe_router_num_groups, sizes.moe_router_group_topk
        )
        weights = routing_weights(scores, chosen, sizes.moe_router_topk_scaling_factor)
        record.chosen.append(chosen.view(*x.shape[:2], -1))
        record.z_loss.append(z_loss_of(logits))
        record.balance_loss.append(balance_loss_of(logits, sizes.moe_router_topk))

        output = self._routed(prefix + "experts.", x.flatten(0, 1), chosen, weights).view_as(x)
        if prefix + "shared_experts.linear_fc1.weight" in self.weights:
            output = output + self._ffn(prefix + "shared_experts.", x, sizes.shared_activation)
        return output

    def _routed(self, prefix: str, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum over a token's experts of weight * expert(x), in fp32 at least; x [N, h], chosen and weights [N, K]."""
        activation = activation_function(self.sizes.routed_activation)
        output = torch.zeros_like(at_least_fp32(x))
        for expert, (fc1, fc2) in enumerate(
            zip(self.weights[prefix + "weight1"], self.weights[prefix + "weight2"], strict=True)
        ):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            result = activation(x[token] @ fc1.T) @ fc2.T
            output = output.index_add(0, token, weights[token, slot, None] * result)
        return output.to(x.dtype)
