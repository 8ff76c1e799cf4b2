"""Rules between the settings of the model; each yields what is wrong and how to mend it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ling.config.derived import kv_channels, num_query_groups
from ling.config.errors import UserError
from ling.config.keys import ACTIVATION_KEYS
from ling.config.schema import Config, ModelConfig, ParallelConfig, PrecisionConfig, RuntimeConfig

# Fields of TransformerConfig that follow from other settings than one of the same name.
_SET_BY_LING = {
    "activation_func": "model.activation",
    "gated_linear_unit": "model.activation",
    "bias_activation_fusion": "model.activation",
    "activation_func_clamp_value": "model.activation",
    "normalization": "the architecture",
    "add_bias_linear": "the architecture",
    "add_qkv_bias": "the architecture",
    "moe_layer_freq": "model.first_k_dense_replace",
    "moe_router_score_function": "the architecture",
    "moe_router_dtype": "the architecture",
    "moe_router_load_balancing_type": "model.moe_aux_loss_coeff",
    "moe_grouped_gemm": "runtime.grouped_gemm",
    "init_method": "model.init_method_std",
    "output_layer_init_method": "model.output_init",
    "bf16": "precision.recipe",
    "fp16": "precision.recipe",
    "fp8": "precision.recipe",
    "fp8_recipe": "precision.fp8_recipe",
    "params_dtype": "precision.recipe",
    "pipeline_dtype": "precision.recipe",
}
_WITHOUT_EFFECT = {
    "moe_expert_capacity_factor": "ling's router drops no tokens",
    "moe_pad_expert_input_to_capacity": "ling's router drops no tokens",
    "moe_input_jitter_eps": "ling's router adds no noise",
    "moe_router_force_load_balancing": "ling's router chooses by score",
    "layernorm_zero_centered_gamma": "ling's RMSNorm has no such form",
    "window_size": "ling's attention has no window",
    "multi_latent_attention": "ling's attention is grouped-query",
}
_BRANCHES = (
    ("model", ModelConfig),
    ("parallel", ParallelConfig),
    ("precision", PrecisionConfig),
    ("runtime", RuntimeConfig),
)
_MOE_ONLY = (
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "shared_activation",
    "routed_activation",
)


def _heads(config: Config, world: int | None) -> Iterator[str]:
    model = config.model
    heads, groups = model.num_attention_heads, num_query_groups(model)
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads: hidden_size {model.hidden_size} is not a multiple of {heads} heads; "
            "change one, or give model.kv_channels"
        )
        return
    if heads % groups:
        yield f"model.num_query_groups: {heads} heads are not a multiple of {groups} groups; use a divisor of {heads}"
    rotary = kv_channels(model) * model.rotary_percent
    if abs(rotary - round(rotary)) > 1e-6 or round(rotary) % 2 or round(rotary) < 2:
        yield (
            f"model.rotary_percent: {model.rotary_percent} of a head of {kv_channels(model)} channels rotates "
            f"{rotary:g} of them, which must be an even number of at least 2; change rotary_percent or kv_channels"
        )


def _layers(config: Config, world: int | None) -> Iterator[str]:
    model = config.model
    dense, layers = model.first_k_dense_replace, model.num_layers
    if dense > layers:
        yield f"model.first_k_dense_replace: {dense} is more than num_layers ({layers}); lower it"
    elif model.num_moe_experts is not None and dense == layers:
        yield (
            f"model.first_k_dense_replace: all {layers} layers would be dense in a model with experts; "
            "lower it, or set model.num_moe_experts=null"
        )


def _dense_model(config: Config, world: int | None) -> Iterator[str]:
    if config.model.num_moe_experts is not None:
        return
    for name in _MOE_ONLY:
        if getattr(config.model, name) is not None:
            yield f"model.{name}: has no meaning without experts; remove it, or set model.num_moe_experts"


def _experts(config: Config, world: int | None) -> Iterator[str]:
    model = config.model
    experts, topk = model.num_moe_experts, model.moe_router_topk
    if experts is None:
        return
    if model.moe_ffn_hidden_size is None:
        yield "model.moe_ffn_hidden_size: not given; a model with experts needs the width of one expert"
    if topk > experts:
        yield f"model.moe_router_topk: {topk} is more than num_moe_experts ({experts}); lower it"
    groups, group_topk = model.moe_router_num_groups, model.moe_router_group_topk
    if (groups is None) != (group_topk is None):
        absent = "moe_router_group_topk" if group_topk is None else "moe_router_num_groups"
        yield f"model.{absent}: not given; moe_router_num_groups and moe_router_group_topk go together: set both"
    if groups is not None and group_topk is not None:
        yield from _expert_groups(experts, topk, groups, group_topk)


def _expert_groups(experts: int, topk: int, groups: int, group_topk: int) -> Iterator[str]:
    if experts % groups:
        yield f"model.moe_router_num_groups: {experts} experts do not divide into {groups} groups; use a divisor"
        return
    size = experts // groups
    if size < 2:
        yield (
            f"model.moe_router_num_groups: {groups} groups of {size} expert; a group is chosen by its two best "
            f"experts: use at most {experts // 2} groups"
        )
    if group_topk > groups:
        yield f"model.moe_router_group_topk: {group_topk} is more than moe_router_num_groups ({groups}); lower it"
    elif topk > group_topk * size:
        yield (
            f"model.moe_router_topk: {topk} experts cannot be chosen from {group_topk} groups of {size}; "
            "lower it, or raise model.moe_router_group_topk"
        )


def _activations(config: Config, world: int | None) -> Iterator[str]:
    from ling.activations.table import resolve

    for name in ACTIVATION_KEYS:
        spec = getattr(config.model, name)
        if spec is None and name == "activation":
            yield "model.activation: is null; give a name such as powlu or swiglu (`ling activations` lists them)"
        elif spec is not None:
            try:
                resolved = resolve(spec, f"model.{name}", config.model.num_layers)
                for width in _widths(config.model, name):
                    resolved.check_width(width, f"model.{name}")
            except UserError as error:
                yield str(error)


def _widths(model: ModelConfig, key: str) -> list[int]:
    """Widths of the FFNs that take their activation from this key."""
    widths = {"dense_activation": model.ffn_hidden_size}
    if model.num_moe_experts is not None:
        if model.first_k_dense_replace == 0:
            widths = {}
        widths["shared_activation"] = model.moe_shared_expert_intermediate_size or 0
        widths["routed_activation"] = model.moe_ffn_hidden_size or 0
    users = {name: name if getattr(model, name) is not None else "activation" for name in widths}
    return sorted({width for name, width in widths.items() if width and users[name] == key})


def _mcore(config: Config, world: int | None) -> Iterator[str]:
    homes = {field.name: f"{branch}.{field.name}" for branch, cls in _BRANCHES for field in dataclasses.fields(cls)}
    for name in config.model.mcore:
        if name in homes:
            yield f"model.mcore.{name}: is a setting of its own; set {homes[name]} instead"
        elif name in _SET_BY_LING:
            yield f"model.mcore.{name}: follows from {_SET_BY_LING[name]}; remove it"
        elif name in _WITHOUT_EFFECT:
            yield f"model.mcore.{name}: would have no effect, {_WITHOUT_EFFECT[name]}; remove it"


MODEL_RULES = (_heads, _layers, _dense_model, _experts, _activations, _mcore)
