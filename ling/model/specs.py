"""Which module sits in which slot of megatron-core's layers: the whole table of the Ling decoder."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from ling.model.attention import FlashAttention, SdpaAttention
from ling.model.counts import is_moe_layer
from ling.model.experts import LingMoE
from ling.model.linears import linears
from ling.model.mlp import DenseMLP
from ling.model.norm import RMSNorm


def core_attention(implementation: str) -> type:
    """The core attention module of a name that `ling.platform.select` knows."""
    if implementation == "te":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return {"sdpa": SdpaAttention, "flash": FlashAttention}[implementation]


def layer_spec(config: Any, mlp: type) -> ModuleSpec:
    """One pre-norm decoder layer: attention with QK-norm before RoPE, then the given FFN."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    column, row, norm_and_column = linears(config)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=norm_and_column or column,
            core_attention=core_attention(config.operations["attention"]),
            linear_proj=row,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if norm_and_column else RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if norm_and_column and mlp is DenseMLP else RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            # a norm that is fused into the next layer keeps its own name in checkpoints
            sharded_state_dict_keys_map={
                "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
                "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
            },
        ),
    )


def decoder_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this rank's model chunk: the first `first_k_dense_replace` of the model dense, the others MoE."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    dense, moe = layer_spec(config, DenseMLP), layer_spec(config, LingMoE)
    kinds = [moe if is_moe_layer(config.ling, layer) else dense for layer in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=kinds, layer_norm=RMSNorm)


class LingBackend(LocalSpecProvider):
    """What megatron-core's MTP layer asks for: linear layers and norms."""

    def layer_norm(self, *args: Any, **kwargs: Any) -> type:
        """RMSNorm, everywhere."""
        return RMSNorm

    def column_parallel_linear(self) -> type:
        """megatron-core's own also with Transformer Engine: its output is gathered over the ranks."""
        return ColumnParallelLinear


def mtp_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The multi-token-prediction layers of this rank's chunk (a layer like the decoder's last), or None."""
    if not config.mtp_num_layers:
        return None
    spec = layer_spec(config, LingMoE if is_moe_layer(config.ling, config.num_layers - 1) else DenseMLP)
    return get_gpt_mtp_block_spec_for_backend(config, spec, backend=LingBackend(), vp_stage=vp_stage)
