"""Configuration of Ling 2.0 models, for transformers 4.51 and later."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PretrainedConfig

SHIPPED_ACTIVATIONS: tuple[str, ...] = ()
"""Activations whose code is in this directory. transformers tells models with code of their own apart by this class's
file, so those of other activations must have another one."""

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": None,
    "rotary_dim": None,
    "partial_rotary_factor": 0.5,
    "rope_theta": None,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "use_qk_norm": True,
    "hidden_act": "silu",
    "num_experts": None,
    "num_experts_per_tok": 8,
    "num_shared_experts": None,
    "moe_intermediate_size": None,
    "moe_shared_expert_intermediate_size": None,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "moe_router_enable_expert_bias": True,
    "num_nextn_predict_layers": 0,
    "mtp_loss_scaling_factor": 0.0,
    "initializer_range": 0.02,
}


class BailingMoeV2Config(PretrainedConfig):
    """Sizes and constants of a model; the names are those of inclusionAI's Ling 2.0.

    `hidden_act` names the activation of the FFNs and `<name>_<setting>` its settings; with `hidden_act: mixed` each
    kind of FFN (`dense`, `shared`, `routed`) has keys of its own, `dense_hidden_act` and so on.
    """

    model_type = "bailing_moe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # not a property that renames other keys, as in transformers 5
    rope_scaling = None

    def __init__(self, rope_scaling: Any = None, tie_word_embeddings: bool = False, **kwargs: Any) -> None:
        if rope_scaling not in (None, {}) or tie_word_embeddings:
            raise ValueError("this architecture has neither rope_scaling nor tied embeddings")
        rope = kwargs.pop("rope_parameters", None) or {}  # where transformers 5 may have saved rope_theta
        values: dict[str, Any] = {key: kwargs.pop(key, default) for key, default in _DEFAULTS.items()}
        values["head_dim"] = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
        # the number of rotated channels is said twice, since other readers know one or the other key
        rotary = values["rotary_dim"] or round(values["head_dim"] * values["partial_rotary_factor"])
        values |= {"rotary_dim": rotary, "partial_rotary_factor": rotary / values["head_dim"]}
        values["rope_theta"] = values["rope_theta"] or rope.get("rope_theta", 10000.0)
        for key, value in values.items():
            setattr(self, key, value)
        super().__init__(tie_word_embeddings=False, **kwargs)

    @property
    def shared_intermediate_size(self) -> int:
        """Width of all shared experts together; 0 where there are none."""
        if not self.num_shared_experts:
            return 0
        return self.num_shared_experts * (self.moe_shared_expert_intermediate_size or self.moe_intermediate_size or 0)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer (0-based, MTP layers after the others) has experts."""
        return bool(self.num_experts) and layer >= self.first_k_dense_replace

    def activation(self, kind: str) -> tuple[str, str]:
        """The activation of a kind of FFN: its `hidden_act`, and the prefix of the keys of its settings."""
        prefix = f"{kind}_" if self.hidden_act == "mixed" else ""
        return getattr(self, f"{prefix}hidden_act"), prefix
