"""config.json of a model directory from a model's settings, and back.

Every key is written out: re-saving with a library would move or drop some. Sources: the configuration of
inclusionAI's Ling 2.0 models; keys of ours are those of activations (see `activation_keys`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ling.activations.table import ACTIVATIONS, resolve
from ling.config.derived import activation_for, kv_channels, num_query_groups, padded_vocab_size
from ling.config.errors import UserError
from ling.config.schema import ModelConfig

ARCHITECTURE, MODEL_TYPE = "BailingMoeV2ForCausalLM", "bailing_moe"
CONFIGURATION, MODELING = "configuration_bailing_moe_v2", "modeling_bailing_moe_v2"
KINDS = ("dense", "shared", "routed")
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}

# Settings that are a key of the same meaning. Ours: theirs.
_SAME = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "rotary_base": "rope_theta",
    "qk_layernorm": "use_qk_norm",
    "layernorm_epsilon": "rms_norm_eps",
    "mtp_num_layers": "num_nextn_predict_layers",
    "mtp_loss_scaling_factor": "mtp_loss_scaling_factor",
    "init_method_std": "initializer_range",
}
_SAME_MOE = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_router_enable_expert_bias": "moe_router_enable_expert_bias",
}
# What every model of this family has; a directory that says otherwise is another architecture.
_FIXED: dict[str, Any] = {
    "use_rmsnorm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
    "router_dtype": "fp32",
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "quantization_config": None,
}
_NOT_WRITTEN = ("quantization_config",)
_NO_EFFECT = ("deterministic_mode", "cross_entropy_loss_fusion", "gradient_accumulation_fusion", "moe_permute_fusion")
_NO_EFFECT_PREFIXES = ("tp_comm_", "cpu_offloading", "moe_shared_expert_overlap", "distribute_saved", "batch_p2p")


def hf_config(model: ModelConfig, dtype: str, tokens: Mapping[str, int | None]) -> dict[str, Any]:
    """The content of config.json.

    Args:
        dtype: `float32` or `bfloat16`, of the weights.
        tokens: ids `bos`, `eos`, `pad`; null where the tokenizer has none.

    Raises:
        UserError: the model has something that this form cannot express.
    """
    _check_expressible(model)
    heads = num_query_groups(model)
    moe = model.num_moe_experts is not None
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.BailingMoeV2Config",
            "AutoModel": f"{MODELING}.BailingMoeV2Model",
            "AutoModelForCausalLM": f"{MODELING}.{ARCHITECTURE}",
        },
        "vocab_size": padded_vocab_size(model),
        **{theirs: getattr(model, ours) for ours, theirs in _SAME.items()},
        "num_key_value_heads": heads,
        "head_dim": kv_channels(model),
        "partial_rotary_factor": model.rotary_percent,
        "rotary_dim": round(kv_channels(model) * model.rotary_percent),
        "first_k_dense_replace": model.first_k_dense_replace if moe else model.num_layers,
        **{theirs: getattr(model, ours) if moe else None for ours, theirs in _SAME_MOE.items()},
        "num_experts_per_tok": model.moe_router_topk if moe else 1,
        **_shared_experts(model),
        # 1 of 1 where there are no groups: stock code divides by n_group
        "n_group": model.moe_router_num_groups or 1,
        "topk_group": model.moe_router_group_topk or 1,
        **{key: value for key, value in _FIXED.items() if key not in _NOT_WRITTEN},
        **activation_keys(model),
        "bos_token_id": tokens["bos"],
        "eos_token_id": tokens["eos"],
        "pad_token_id": tokens["pad"],
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if not moe:  # stock code compares these with numbers
        config |= {"moe_router_enable_expert_bias": False, "routed_scaling_factor": 1.0}
    return config


def _shared_experts(model: ModelConfig) -> dict[str, int | None]:
    """Stock code takes their number times the width of a routed one, vLLM and SGLang times the width that is given."""
    width, routed = model.moe_shared_expert_intermediate_size, model.moe_ffn_hidden_size
    if width is None or routed is None:
        return {"num_shared_experts": None, "moe_shared_expert_intermediate_size": None}
    number = width // routed if width % routed == 0 else 1
    return {"num_shared_experts": number, "moe_shared_expert_intermediate_size": width // number}


def _check_expressible(model: ModelConfig) -> None:
    for name in model.mcore:
        if name not in _NO_EFFECT and not name.startswith(_NO_EFFECT_PREFIXES):
            raise UserError(
                f"model.mcore.{name}: a Hugging Face directory of this architecture cannot say it, and it may change "
                "what the model computes; such a model cannot be exported"
            )
    groups, group_topk = model.moe_router_num_groups, model.moe_router_group_topk
    if groups is not None and model.num_moe_experts is not None:
        size = model.num_moe_experts // groups
        if group_topk is None or size < 2 or size * groups != model.num_moe_experts:
            raise UserError(
                f"model.moe_router_num_groups: {groups} groups of {model.num_moe_experts} experts, {group_topk} "
                "chosen: a Hugging Face directory of this architecture has groups of equal size, which are chosen by "
                "their two best experts; such a model cannot be exported"
            )


# ---- activations


def activation_keys(model: ModelConfig) -> dict[str, Any]:
    """`hidden_act` and its settings, `<name>_<setting>`: `hidden_act: powlu, powlu_m: 3.0`.

    Where the kinds of FFN differ, `hidden_act` is `mixed` and each kind has its own keys, `dense_hidden_act` and so on.
    Un-gated activations carry the prefix `ungated_`: stock code, which knows gated FFNs only, then stops instead of
    computing something else.
    """
    kinds = kinds_of(model)
    specs = {kind: resolve(activation_for(model, kind), f"model.{kind}_activation", model.num_layers) for kind in kinds}
    first = specs[kinds[0]]
    if all(spec == first for spec in specs.values()):
        return _settings(first, "")
    keys: dict[str, Any] = {"hidden_act": "mixed"}
    for kind, spec in specs.items():
        keys |= _settings(spec, f"{kind}_")
    return keys


def kinds_of(model: ModelConfig) -> list[str]:
    """The kinds of FFN that a model has."""
    if model.num_moe_experts is None:
        return ["dense"]
    kinds = ["routed"]
    if model.moe_shared_expert_intermediate_size:
        kinds.insert(0, "shared")
    if model.first_k_dense_replace:
        kinds.insert(0, "dense")
    return kinds


def hidden_act(row: Any) -> str:
    """The name of a row of the registry in config.json."""
    return row.hidden_act if row.gated else f"ungated_{row.hidden_act}"


def _settings(resolved: Any, prefix: str) -> dict[str, Any]:
    row = resolved.activation
    keys = {f"{prefix}hidden_act": hidden_act(row)}
    keys |= {f"{prefix}{row.name}_{name}": value for name, value in resolved.params.items()}
    if row.learnable:
        keys |= {f"{prefix}{row.name}_{name}": value for name, value in resolved.initial.items()}
        keys[f"{prefix}{row.name}_learn"] = resolved.learn
    return keys


def _activation_of(config: Mapping[str, Any], prefix: str, where: str) -> dict[str, Any]:
    name = config.get(f"{prefix}hidden_act")
    rows = {hidden_act(row): row for row in ACTIVATIONS.values()}
    if name not in rows:
        raise UserError(f"{where}: {prefix}hidden_act {name!r} is no activation that ling has: {', '.join(rows)}")
    row = rows[name]
    start = f"{prefix}{row.name}_"
    given = {parameter.name for parameter in row.parameters} | {learnable.name for learnable in row.learnable}
    settings = {key: config[start + key] for key in (*sorted(given), "learn") if start + key in config}
    spec = {"name": row.name, **settings}
    resolve(spec, f"{where}: {prefix}hidden_act", None)
    return spec


def _activations(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    if config.get("hidden_act") != "mixed":
        return {"activation": _activation_of(config, "", where)}
    found = {kind: _activation_of(config, f"{kind}_", where) for kind in KINDS if f"{kind}_hidden_act" in config}
    if not found:
        raise UserError(f"{where}: hidden_act is mixed, but none of {', '.join(f'{k}_hidden_act' for k in KINDS)} is")
    first = next(iter(found.values()))
    return {"activation": first} | {f"{kind}_activation": spec for kind, spec in found.items() if spec != first}


# ---- back


def check_architecture(config: Mapping[str, Any], where: str) -> None:
    """UserError where a config.json is not of Ling 2.0's architecture."""
    architectures = config.get("architectures") or []
    if ARCHITECTURE not in architectures:
        found = ", ".join(map(str, architectures)) or "none named"
        raise UserError(f"{where}: architecture {found}; ling reads {ARCHITECTURE} (Ling 2.0 and its own exports)")


def model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model's settings from a config.json.

    Raises:
        UserError: it is of another architecture, lacks a key, or says something that `ling` does not have.
    """
    check_architecture(config, where)
    for key, value in _FIXED.items():
        if key in config and (config[key] or None) != (value or None):
            raise UserError(f"{where}: {key} is {config[key]!r}; ling has {value!r} only")
    return _checked(_values(config, where), where)


def _values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    def get(key: str) -> Any:
        if config.get(key) is None:
            raise UserError(f"{where}: {key} is missing; the model cannot be built without it")
        return config[key]

    optional = ("mtp_loss_scaling_factor", "init_method_std", "moe_router_enable_expert_bias", "qk_layernorm")
    names = dict(_SAME)
    moe = bool(config.get("num_experts"))
    if moe:
        names |= _SAME_MOE
    values: dict[str, Any] = {ours: get(theirs) for ours, theirs in names.items() if ours not in optional}
    values |= {ours: config[names[ours]] for ours in optional if config.get(names.get(ours, "")) is not None}
    head = config.get("head_dim") or get("hidden_size") // get("num_attention_heads")
    rotary = config.get("rotary_dim")
    factor = rotary / head if rotary else config.get("partial_rotary_factor")
    if factor is None:
        raise UserError(f"{where}: neither rotary_dim nor partial_rotary_factor; how much of a head is rotated?")
    values |= {
        "num_query_groups": get("num_key_value_heads"),
        "kv_channels": head,
        "rotary_percent": factor,
        "vocab_size": get("vocab_size"),
        "make_vocab_size_divisible_by": 1,
        **_activations(config, where),
    }
    return values | (_moe_values(config, get) if moe else {"first_k_dense_replace": 1})


def _moe_values(config: Mapping[str, Any], get: Any) -> dict[str, Any]:
    number = config.get("num_shared_experts") or 0
    width = number * (config.get("moe_shared_expert_intermediate_size") or get("moe_intermediate_size"))
    groups, group_topk = config.get("n_group") or 1, config.get("topk_group") or 1
    return {
        "first_k_dense_replace": config.get("first_k_dense_replace") or 0,
        "moe_shared_expert_intermediate_size": width if number else None,
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": group_topk if groups > 1 else None,
    }


def _checked(values: dict[str, Any], where: str) -> ModelConfig:
    fields = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    for name, value in values.items():
        wants_float = str(fields[name]).startswith("float")
        if wants_float and isinstance(value, int) and not isinstance(value, bool):
            values[name] = float(value)
        wrong = str(fields[name]).startswith("int") and not (value is None or type(value) is int)
        if wrong or (wants_float and not isinstance(values[name], float)):
            raise UserError(f"{where}: {name} would be {value!r}, which is no {fields[name]}")
    return ModelConfig(**values)
