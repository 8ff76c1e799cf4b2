"""Activation memory: what each part of a layer keeps for the backward pass, and what the passes need besides."""

# t: tokens of a micro-batch on this rank (with sequence parallelism 1/TP of them); T: all of them; R: rows that reach
# this rank's experts; h: hidden size; w: bytes of an activation, i: of the saved input of a matrix product

from __future__ import annotations

import math
from dataclasses import dataclass

from ling.config.derived import kv_channels, num_query_groups, padded_vocab_size
from ling.config.schema import Config
from ling.model.counts import fc1_width, is_moe_layer
from ling.plan.layout import Chunk, Layout

FP32 = 4


@dataclass(frozen=True)
class Storage:
    """Bytes per element of everything that a rank keeps.

    weight: parameters. matrix: of the decoder's matrices, where they are kept in another format than the rest.
    fp8_copy: further copies of those matrices. gradient: the accumulation buffer. master: fp32 copies of the weights.
    moments: both moments of the optimizer. activation: tensors between operations. gemm_input: the saved inputs of the
    decoder's matrix products.
    """

    weight: float
    matrix: float
    fp8_copy: float
    gradient: float
    master: float
    moments: float
    activation: float
    gemm_input: float

    @classmethod
    def of(cls, config: Config) -> Storage:
        """What `ling` keeps. FP8 adds to bf16 two quantised copies of each matrix (by rows and by columns) and saves
        the inputs of matrix products quantised."""
        recipe = config.precision.recipe
        if recipe == "fp32":
            return cls(4, 4, 0, 4, 0, 8, 4, 4)
        gradient = 4 if config.precision.grad_reduce_in_fp32 else 2
        fp8 = recipe.startswith("fp8")
        return cls(2, 2, 2 if fp8 else 0, gradient, 4, 8, 2, 1 if fp8 else 2)


@dataclass(frozen=True)
class Tokens:
    """Tokens of one micro-batch on one rank: outside the matrices (t), inside (T), and rows of its experts (R)."""

    outside: int
    inside: int
    rows: float

    @classmethod
    def of(cls, config: Config, layout: Layout, imbalance: float = 1.0) -> Tokens:
        """`imbalance`: rows of the rank whose experts get the most, over the mean; a rank with all experts has none."""
        inside = config.train.micro_batch_size * config.data.sequence_length
        outside = inside // layout.token_split
        rows = outside * config.model.moe_router_topk * layout.etp if config.model.num_moe_experts else 0
        return cls(outside, inside, rows * imbalance)


def layer_parts(config: Config, layout: Layout, tokens: Tokens, storage: Storage, moe: bool) -> dict[str, float]:
    """Bytes that one decoder layer keeps of one micro-batch, by part, before any recomputation.

    Attention is a flash kernel (inputs, output, one statistic per head and token); a norm is one fused operation.
    """
    model, tp = config.model, layout.tp
    w, i = storage.activation, storage.gemm_input
    h, d = model.hidden_size, kv_channels(model)
    q, k = model.num_attention_heads * d / tp, num_query_groups(model) * d / tp
    inside, outside, rows = tokens.inside, tokens.outside, tokens.rows
    # Under QK-norm the queries are copied out of the fused projection; keys and values are views that keep it alive.
    fused = q + 2 * k + (q if model.qk_layernorm else 0)
    parts = {
        "residual": 2 * outside * h * w,
        "layernorm": 2 * outside * h * i,
        "qkv": inside * (fused * w + 2 * FP32 * (q + k) / d + (q + k) * w),
        "core_attn": inside * (q * w + FP32 * q / d),
        "projection_input": inside * q * i,
    }
    if not moe:
        width = model.ffn_hidden_size
        return parts | {
            "fc1": inside * fc1_width(model, "dense", width) / tp * w,
            "activation": inside * width / tp * i,
        }
    experts, topk, width = model.num_moe_experts or 0, model.moe_router_topk, model.moe_ffn_hidden_size or 0
    logits = 2 if model.moe_z_loss_coeff else 1
    parts["router"] = outside * (FP32 * (h + logits * experts) + topk * (8 + 8 + FP32))
    if model.moe_shared_expert_intermediate_size:
        shared = model.moe_shared_expert_intermediate_size
        parts["shared_fc1"] = inside * fc1_width(model, "shared", shared) / tp * w
        parts["shared_activation"] = inside * shared / tp * i
    parts["dispatched"] = rows * (h * i + 2 * FP32)
    parts["routed_fc1"] = rows * fc1_width(model, "routed", width) / layout.etp * w
    parts["routed_activation"] = rows * width / layout.etp * i
    return parts


_DROPPED = {
    "core_attn": ("core_attn",),
    "layernorm": ("layernorm",),
    "activation": ("activation", "shared_activation", "routed_activation"),
    "mlp": ("fc1", "activation"),
    "shared_experts": ("shared_fc1", "shared_activation"),
    "moe": ("router", "shared_fc1", "shared_activation", "dispatched", "routed_fc1", "routed_activation"),
}
"""The parts that each module of selective recomputation does not keep."""


def dropped_parts(config: Config) -> set[str]:
    """Parts of a layer that selective recomputation computes again."""
    if config.runtime.recompute_granularity != "selective":
        return set()
    return {part for module in config.runtime.recompute_modules for part in _DROPPED[module]}


def layer_bytes(config: Config, layout: Layout, tokens: Tokens, storage: Storage, moe: bool) -> tuple[float, float]:
    """What a layer keeps of a micro-batch, and what its backward pass brings back for a while."""
    parts = layer_parts(config, layout, tokens, storage, moe)
    dropped = sum(parts[name] for name in dropped_parts(config) & set(parts))
    return sum(parts.values()) - dropped, dropped


def chunk_bytes(config: Config, layout: Layout, tokens: Tokens, storage: Storage, chunk: Chunk) -> tuple[float, float]:
    """What the layers of a chunk keep of one micro-batch, and the most that is brought back at a time.

    MTP layers count here too; the head does not.
    """
    model, h = config.model, config.model.hidden_size
    layers = [is_moe_layer(model, layer) for layer in chunk.layers]
    mtp = [is_moe_layer(model, model.num_layers - 1)] * (model.mtp_num_layers if chunk.mtp else 0)
    entry = tokens.outside * h * storage.activation
    # Embeddings of the shifted tokens and the hidden states with their norms, side by side for the projection.
    mtp_entry = tokens.outside * h * (4 * storage.activation + 2 * storage.gemm_input)
    kinds = {moe: layer_bytes(config, layout, tokens, storage, moe) for moe in {*layers, *mtp}}
    if config.runtime.recompute_granularity == "full":
        group = config.runtime.recompute_num_layers
        kept = entry * math.ceil(len(layers) / group) + len(mtp) * 2 * entry
        back = [sum(kinds[moe][0] for moe in layers[i : i + group]) for i in range(0, len(layers), group)]
        return kept, max([*back, *(kinds[moe][0] + mtp_entry for moe in mtp)], default=0.0)
    kept = sum(kinds[moe][0] for moe in [*layers, *mtp]) + len(mtp) * mtp_entry
    return kept, max(kinds[moe][1] for moe in [*layers, *mtp])


def head_bytes(config: Config, layout: Layout, tokens: Tokens, storage: Storage) -> tuple[float, float]:
    """What the head and its losses keep, and the most that they hold besides while the main loss is computed.

    Each pass through the head keeps its probabilities in fp32. Computing one needs the logits, and with
    `cross_entropy_loss_fusion` another fp32 copy.
    """
    model = config.model
    logits = tokens.inside * padded_vocab_size(model) / layout.tp
    passes = 1 + model.mtp_num_layers
    norms = passes * 2 * tokens.outside * model.hidden_size * storage.activation
    fusion = FP32 if model.mcore.get("cross_entropy_loss_fusion") else 0
    return passes * logits * FP32 + norms, logits * (storage.activation + fusion)


def backward_bytes(config: Config, layout: Layout, tokens: Tokens, storage: Storage, moe: bool) -> float:
    """Gradients that the backward pass of one layer's largest part holds at a time."""
    model, w = config.model, storage.activation
    h = model.hidden_size
    if moe:
        width = (model.moe_ffn_hidden_size or 0) / layout.etp
        rows = fc1_width(model, "routed", model.moe_ffn_hidden_size or 0) / layout.etp
        return tokens.rows * (2 * h + width + rows) * w
    return tokens.inside * (model.ffn_hidden_size + fc1_width(model, "dense", model.ffn_hidden_size)) / layout.tp * w


def in_flight(layout: Layout, stage: int, chunk: int, microbatches: int) -> int:
    """Micro-batches whose activations a chunk holds at the peak: 1F1B, interleaved with virtual stages.

    Interleaved, stage p of P runs 2(P - p - 1) + (V - 1)·P chunks ahead, in rounds of P micro-batches per chunk, and
    then one forward and one backward pass in turn.
    """
    pp, vpp = layout.pp, layout.vpp
    if vpp == 1:
        return min(microbatches, pp - stage)
    ahead = min(microbatches * vpp, 2 * (pp - stage - 1) + (vpp - 1) * pp + 1)
    rounds, rest = divmod(ahead, pp * vpp)
    return min(microbatches, rounds * pp + max(0, min(pp, rest - chunk * pp)))
