"""What a model is made of, by arithmetic alone: parameter shapes, parameter counts and FLOPs per token.

`parameter_shapes` is the one description of the structure; the counts and the FLOPs follow from it, so they cannot
disagree. Nothing is built: it works for a trillion parameters, and without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ling.activations.table import resolve
from ling.config.derived import activation_for, kv_channels, num_query_groups, padded_vocab_size
from ling.config.schema import ModelConfig

Shape = tuple[int, ...]
Kind = Literal["dense", "shared", "routed"]


@dataclass(frozen=True)
class LayerCount:
    """Parameters of one layer: all of them, and those that one token uses (of the routed experts, the chosen ones)."""

    name: str
    total: int
    activated: int


@dataclass(frozen=True)
class ComponentCount:
    """All parameters by what they belong to; the fields add up to the model's total.

    `norms` holds every RMSNorm of the decoder, those on query and key heads included; `scalars` what the activations
    learn; `mtp` is the whole MTP layer.
    """

    embedding: int
    attention: int
    dense_ffn: int
    router: int
    routed_experts: int
    shared_experts: int
    norms: int
    output: int
    mtp: int
    scalars: int


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    total: everything that is built, MTP layers and vocabulary padding included; the experts' bias is no parameter.
    activated: what one token uses to predict the next one, counted as Ling's reports do: top-k of the routed experts,
        shared experts, router, attention, norms and dense FFNs, the whole input embedding and the whole output layer;
        not the MTP layers, which are not run to predict the next token.
    embedding: input embedding and output layer together.
    per_layer: decoder layers and then MTP layers. An MTP layer's `activated` is what one token uses of it in training.
    """

    total: int
    activated: int
    embedding: int
    per_layer: tuple[LayerCount, ...]
    components: ComponentCount

    @property
    def total_without_mtp(self) -> int:
        """The total that Ling's model cards print: without the MTP layers."""
        return self.total - self.components.mtp


@dataclass(frozen=True)
class FlopCount:
    """Floating point operations per token; `total` is the sum of the others.

    matmul: projections, FFNs, chosen experts and routers of the decoder layers.
    attention: scores and weighted values of the decoder layers.
    head: the output layer. mtp: the MTP layers with their attention and their own pass through the head.
    """

    matmul: int
    attention: int
    head: int
    mtp: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.matmul + self.attention + self.head + self.mtp


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    """Whether decoder layer `layer` (0-based) has experts; the MTP layer is of the kind of the last decoder layer."""
    return model.num_moe_experts is not None and layer >= model.first_k_dense_replace


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name and full shape of every parameter, as a single rank holds them with the torch backend.

    `experts.weight1` and `experts.weight2` hold all experts of a layer, first dimension the expert.
    """
    vocab, hidden = padded_vocab_size(model), model.hidden_size
    shapes: dict[str, Shape] = {"embedding.word_embeddings.weight": (vocab, hidden)}
    for layer in range(model.num_layers):
        shapes.update(_layer_shapes(model, f"decoder.layers.{layer}.", is_moe_layer(model, layer)))
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    for depth in range(model.mtp_num_layers):
        prefix = f"mtp.layers.{depth}."
        shapes[prefix + "enorm.weight"] = (hidden,)
        shapes[prefix + "hnorm.weight"] = (hidden,)
        shapes[prefix + "eh_proj.weight"] = (hidden, 2 * hidden)
        shapes.update(
            _layer_shapes(model, prefix + "transformer_layer.", is_moe_layer(model, model.num_layers - 1)),
        )
        shapes[prefix + "final_layernorm.weight"] = (hidden,)
    shapes["output_layer.weight"] = (vocab, hidden)
    for kind, length in global_scalar_counts(model).items():
        shapes[f"activation_scalars.{kind}"] = (length,)
    return shapes


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of `model` without building it; `ParameterCount` says what is in which number."""
    shapes = parameter_shapes(model)
    components = dict.fromkeys(ComponentCount.__dataclass_fields__, 0)
    for name, shape in shapes.items():
        components[_component(name)] += math.prod(shape)
    per_layer = tuple(_layer_count(model, prefix, shapes) for prefix in _layer_prefixes(model))
    return ParameterCount(
        total=sum(components.values()),
        activated=sum(_activated(model, name, shape) for name, shape in shapes.items() if not name.startswith("mtp.")),
        embedding=components["embedding"] + components["output"],
        per_layer=per_layer,
        components=ComponentCount(**components),
    )


def flops_per_token(model: ModelConfig, sequence_length: int, *, training: bool = True) -> FlopCount:
    """Floating point operations per token of a sequence of `sequence_length` tokens; a multiply-add is two.

    Forward, with L layers, hidden size h, vocabulary V (padded), H query heads of size d, S = `sequence_length`:

        matmul    = 2 · (weights of all matrices in the decoder layers that one token uses: query/key/value and output
                    projections, dense FFN, router, top-k routed experts, shared experts)
        attention = L · (2 · H·d · S/2 + 2 · H·d · S/2)
                    (scores and values; causal, so that a token sees S/2 keys on average)
        head      = 2 · V · h
        mtp       = per MTP layer: 2 · (weights of its matrices that one token uses, eh_proj's 2h·h among them)
                    + attention of one layer + head

    Training is three times the forward pass: the backward pass has two products for each one of the forward pass.
    Not counted: embedding look-up, norms, RoPE, softmax, the activation function itself, loss and optimizer (together
    small beside the products); recomputation (these are the model's FLOPs, not the machine's). In-document masking
    does not lower the number: a sequence counts as one document.
    """
    shapes = parameter_shapes(model)
    factor = 3 if training else 1
    attention = 2 * 2 * model.num_attention_heads * kv_channels(model) * sequence_length // 2
    head = 2 * math.prod(shapes["output_layer.weight"])
    decoder = _matmul_weights(model, shapes, "decoder.layers.")
    mtp = 2 * _matmul_weights(model, shapes, "mtp.layers.") + model.mtp_num_layers * (attention + head)
    return FlopCount(
        matmul=factor * 2 * decoder,
        attention=factor * model.num_layers * attention,
        head=factor * head,
        mtp=factor * mtp,
    )


def _layer_shapes(model: ModelConfig, prefix: str, moe: bool) -> dict[str, Shape]:
    hidden, head = model.hidden_size, kv_channels(model)
    heads, groups = model.num_attention_heads, num_query_groups(model)
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_proj.weight": (hidden, heads * head),
        "self_attention.linear_qkv.weight": ((heads + 2 * groups) * head, hidden),
    }
    if model.qk_layernorm:
        shapes["self_attention.q_layernorm.weight"] = (head,)
        shapes["self_attention.k_layernorm.weight"] = (head,)
    shapes["pre_mlp_layernorm.weight"] = (hidden,)
    shapes.update(_moe_shapes(model) if moe else _ffn_shapes(model, "mlp.", "dense", model.ffn_hidden_size))
    return {prefix + name: shape for name, shape in shapes.items()}


def _moe_shapes(model: ModelConfig) -> dict[str, Shape]:
    experts, hidden, ffn = model.num_moe_experts, model.hidden_size, model.moe_ffn_hidden_size
    assert experts is not None  # only called for MoE layers
    if ffn is None:
        raise ValueError("model.moe_ffn_hidden_size is missing: a model with experts needs the width of one expert")
    shapes: dict[str, Shape] = {
        "mlp.router.weight": (experts, hidden),
        "mlp.experts.weight1": (experts, fc1_width(model, "routed", ffn), hidden),
        "mlp.experts.weight2": (experts, hidden, ffn),
        **_scalar_shapes(model, "mlp.experts.", "routed"),
    }
    if model.moe_shared_expert_intermediate_size:
        shapes.update(_ffn_shapes(model, "mlp.shared_experts.", "shared", model.moe_shared_expert_intermediate_size))
    return shapes


def _ffn_shapes(model: ModelConfig, prefix: str, kind: Kind, width: int) -> dict[str, Shape]:
    return {
        prefix + "linear_fc1.weight": (fc1_width(model, kind, width), model.hidden_size),
        prefix + "linear_fc2.weight": (model.hidden_size, width),
        **_scalar_shapes(model, prefix, kind),
    }


def _scalar_shapes(model: ModelConfig, prefix: str, kind: Kind) -> dict[str, Shape]:
    """What the activation of one FFN learns on its own."""
    resolved = resolve(activation_for(model, kind))
    return {prefix + "activation.scalars": (len(resolved.initial_scalars()),)} if resolved.learn == "per_layer" else {}


def fc1_width(model: ModelConfig, kind: Kind, width: int) -> int:
    """Rows of the first projection: gate and up where this kind of FFN has a gated activation, else one projection."""
    return 2 * width if resolve(activation_for(model, kind)).activation.gated else width


def kinds(model: ModelConfig) -> list[Kind]:
    """The kinds of FFN that the decoder has."""
    found: list[Kind] = []
    if not all(is_moe_layer(model, layer) for layer in range(model.num_layers)):
        found.append("dense")
    if is_moe_layer(model, model.num_layers - 1):
        found += ["shared", "routed"] if model.moe_shared_expert_intermediate_size else ["routed"]
    return found


def global_scalar_counts(model: ModelConfig) -> dict[Kind, int]:
    """How many scalars the activations of all layers learn together (`learn: global`), by kind of FFN."""
    resolved = {kind: resolve(activation_for(model, kind)) for kind in kinds(model)}
    return {kind: len(found.initial_scalars()) for kind, found in resolved.items() if found.learn == "global"}


def _layer_prefixes(model: ModelConfig) -> Iterator[str]:
    yield from (f"decoder.layers.{layer}." for layer in range(model.num_layers))
    yield from (f"mtp.layers.{depth}." for depth in range(model.mtp_num_layers))


def _layer_count(model: ModelConfig, prefix: str, shapes: dict[str, Shape]) -> LayerCount:
    inside = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
    return LayerCount(
        name=prefix.removesuffix("."),
        total=sum(math.prod(shape) for shape in inside.values()),
        activated=sum(_activated(model, name, shape) for name, shape in inside.items()),
    )


def _component(name: str) -> str:
    """The field of ComponentCount that a parameter belongs to."""
    if name.startswith("mtp."):
        return "mtp"
    if name.endswith(".scalars") or name.startswith("activation_scalars."):
        return "scalars"
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("output_layer."):
        return "output"
    if "layernorm" in name:
        return "norms"
    if ".self_attention." in name:
        return "attention"
    for part, component in (
        (".router.", "router"),
        (".experts.", "routed_experts"),
        (".shared_experts.", "shared_experts"),
    ):
        if part in name:
            return component
    return "dense_ffn"


def _activated(model: ModelConfig, name: str, shape: Shape) -> int:
    """Elements of a parameter that one token uses."""
    if ".mlp.experts." in name and len(shape) > 1:
        return model.moe_router_topk * math.prod(shape[1:])  # the first dimension is the expert
    return math.prod(shape)


def _matmul_weights(model: ModelConfig, shapes: dict[str, Shape], prefix: str) -> int:
    """Elements of the matrices under `prefix` that one token is multiplied with."""
    return sum(
        _activated(model, name, shape)
        for name, shape in shapes.items()
        if name.startswith(prefix) and len(shape) > 1  # norms are vectors
    )
