"""From a config to a model: TransformerConfig, model chunks, wrappers. The one place that constructs GPTModel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from ling.config.derived import expert_tensor_parallel_size, kv_channels, num_query_groups, padded_vocab_size
from ling.config.errors import UserError
from ling.config.schema import Config, ModelConfig, RuntimeConfig
from ling.model import specs
from ling.model.init import initialize, mark_tensor_parallel
from ling.model.scalars import sharded_global_scalars, share_global_scalars
from ling.parallel import groups
from ling.platform import Platform


@dataclass
class LingTransformerConfig(TransformerConfig):
    """megatron-core's TransformerConfig, and what its modules need to know of `ling`'s."""

    ling: ModelConfig = field(default_factory=ModelConfig)
    operations: dict[str, str] = field(default_factory=dict)
    recompute_activation: bool = False
    """Whether the FFNs compute their activation again in the backward pass instead of keeping fc2's input."""


class LingModel(GPTModel):
    """GPTModel that gives logits without labels also when it has multi-token-prediction layers.

    Its checkpoints are the same for every backend: the extra state of Transformer Engine's layers stays out. It is
    empty but for delayed scaling in FP8, which is not offered.
    """

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of this rank's part of the checkpointed tensors."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state = {key: value for key, value in state.items() if not is_extra_state(key)}
        return state | sharded_global_scalars(self, prefix)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, where no extra state is missed."""
        missing, unexpected = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in missing if not is_extra_state(key)]
        if strict and (missing or unexpected):
            raise RuntimeError(f"state dict does not fit the model: missing {missing}, unexpected {unexpected}")
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    rotary_by_position = False
    """Whether rotary embeddings follow `position_ids`, which megatron-core's do not look at."""

    def _preprocess(self, input_ids: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        decoder_input, rotary_S11D, *others = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if self.rotary_by_position:
            rotary_S11D = rotary_S11D[position_ids.t()].squeeze(2)  # now one for each sequence: [S, B, 1, D]
        return decoder_input, rotary_S11D, *others

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, labels: Any = None, **kwargs: Any) -> torch.Tensor:
        if labels is None and self.post_process:
            logits_SBV, _ = self.output_layer(hidden_states, runtime_gather_output=True)
            return logits_SBV.transpose(0, 1).contiguous()
        return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)


def is_extra_state(key: str) -> bool:
    """Whether a key of a state dict is no weight, but what a layer of Transformer Engine keeps about FP8."""
    return "._extra_state" in key


def transformer_config(config: Config, *, bf16: bool, operations: Mapping[str, str]) -> LingTransformerConfig:
    """The TransformerConfig of a run.

    Args:
        config: the run.
        bf16: whether weights and activations are bf16, else fp32.
        operations: implementation of each operation (`ling.platform.select.choose`).

    Raises:
        UserError: `model.mcore` names a field that TransformerConfig lacks or that `ling` sets, or a value is refused.
    """
    ours = _fields(config, bf16) | {
        "ling": config.model,
        "operations": dict(operations),
        "recompute_activation": config.runtime.recompute_granularity == "selective"
        and "activation" in config.runtime.recompute_modules,
    }
    extra = config.model.mcore
    known = {entry.name for entry in dataclasses.fields(TransformerConfig)}
    for key in extra:
        if key not in known:
            raise UserError(f"model.mcore.{key}: megatron-core's TransformerConfig has no such field")
        if key in ours:
            raise UserError(f"model.mcore.{key}: ling sets this field itself; use the setting of ling's own config")
    try:
        return LingTransformerConfig(**ours, **extra)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"megatron-core refuses this model: {' '.join(str(error).split())}") from error


def _fields(config: Config, bf16: bool) -> dict[str, Any]:
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if bf16 else torch.float32
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": num_query_groups(model),
        "kv_channels": kv_channels(model),
        "ffn_hidden_size": model.ffn_hidden_size,
        "qk_layernorm": model.qk_layernorm,
        "layernorm_epsilon": model.layernorm_epsilon,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "mtp_num_layers": model.mtp_num_layers or None,
        "mtp_loss_scaling_factor": model.mtp_loss_scaling_factor,
        "calculate_per_token_loss": True,
        "bf16": bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        # Interleaved stages of PP=2 send to both neighbours, which are one rank: a batch would match them wrongly.
        "overlap_p2p_comm": parallel.virtual_pipeline_model_parallel_size is not None,
        "batch_p2p_comm": parallel.virtual_pipeline_model_parallel_size is None,
        "pipeline_model_parallel_layout": _pipeline_layout(config),
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": expert_tensor_parallel_size(parallel),
        # Tensors are made on the device of the surrounding `with torch.device(...)`, and filled by ling.model.init.
        "use_cpu_initialization": True,
        "perform_initialization": False,
    }
    fields |= _recompute_fields(config.runtime)
    if config.precision.recipe == "fp8":
        fields |= {"fp8": config.precision.fp8_format, "fp8_recipe": config.precision.fp8_recipe}
    if model.num_moe_experts is not None:
        dense = model.first_k_dense_replace
        fields |= {
            "num_moe_experts": model.num_moe_experts,
            "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
            "moe_router_topk": model.moe_router_topk,
            "moe_layer_freq": [0] * dense + [1] * (model.num_layers - dense),
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "none",
            "moe_router_score_function": "sigmoid",
            "moe_router_dtype": "fp32",
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": True,
        }
    return fields


def _pipeline_layout(config: Config) -> list[list[str]] | None:
    """What each model chunk holds, where `num_layers_per_stage` says so: MTP and loss stand in the last one."""
    counts = config.parallel.num_layers_per_stage
    if counts is None:
        return None
    layout = [["decoder"] * count for count in counts]
    layout[0].insert(0, "embedding")
    layout[-1] += ["mtp"] * config.model.mtp_num_layers + ["loss"]
    return layout


def _recompute_fields(runtime: RuntimeConfig) -> dict[str, Any]:
    """megatron-core's settings of activation recomputation; `activation` is not among them, the FFNs do that."""
    if runtime.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": runtime.recompute_num_layers,
        }
    modules = [name for name in runtime.recompute_modules if name != "activation"]
    if runtime.recompute_granularity == "selective" and modules:
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {}


def check_model_config(config: Config) -> None:
    """Have megatron-core look at the model's settings, without building anything.

    Raises:
        UserError: see `transformer_config`.
    """
    transformer_config(config, bf16=config.precision.recipe != "fp32", operations={})


def build_model(
    config: Config, device: torch.device, *, bf16: bool, operations: Mapping[str, str], seed: int | None = None
) -> list[LingModel]:
    """This rank's model chunks (one, or one per virtual pipeline stage), initialised.

    Args:
        config: the run.
        device: where the weights live; `meta` builds shapes only.
        bf16, operations: see `transformer_config`.
        seed: of the initial weights; null: the run's.
    """
    mcore_config = transformer_config(config, bf16=bf16, operations=operations)
    stages = range(config.parallel.virtual_pipeline_model_parallel_size or 1)
    chunks = []
    for stage in stages:
        vp_stage = stage if len(stages) > 1 else None
        with torch.device(device):
            chunk = _build_chunk(config, mcore_config, vp_stage)
            share_global_scalars(chunk)
        mark_tensor_parallel(chunk)
        if device.type != "meta":
            initialize(chunk, config.model, config.run.seed if seed is None else seed)
        chunks.append(chunk)
    return chunks


def _build_chunk(config: Config, mcore_config: LingTransformerConfig, vp_stage: int | None) -> LingModel:
    model = config.model
    chunk = LingModel(
        config=mcore_config,
        transformer_layer_spec=specs.decoder_spec(mcore_config, vp_stage),
        vocab_size=padded_vocab_size(model),
        max_sequence_length=model.max_position_embeddings,
        pre_process=groups.is_first_stage(vp_stage),
        post_process=groups.is_last_stage(vp_stage),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,  # type: ignore[arg-type]
        mtp_block_spec=specs.mtp_spec(mcore_config, vp_stage),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        vp_stage=vp_stage,
    )
    chunk.rotary_by_position = config.data.reset_position_ids
    return chunk


def wrap_model(config: Config, chunks: list[LingModel], platform: Platform, *, bf16: bool) -> list[Any]:
    """The chunks as the trainer runs them: cast to bf16 where wanted, then megatron-core's data parallelism."""
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        module: Any = Float16Module(chunk.config, chunk) if bf16 else chunk
        wrapped.append(
            DistributedDataParallel(
                chunk.config,
                ddp_config,
                module,
                # Later chunks' gradients are ready all at once: one bucket.
                disable_bucketing=index > 0,
            )
        )
    return wrapped
