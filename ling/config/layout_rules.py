"""Rules between the parallel layout, the model's sizes and the number of ranks; each yields a problem and its mend."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ling.config.derived import (
    data_parallel_size,
    expert_tensor_parallel_size,
    num_microbatches,
    num_query_groups,
    padded_vocab_size,
)
from ling.config.keys import LARGEST_INT
from ling.config.schema import Config, TrainConfig


def _indivisible(key: str, size: int | None, by: int, what: str) -> Iterator[str]:
    if size is not None and size % by:
        yield f"{key}: {size} is not a multiple of {what} ({by}); change one of them"


def _tensor_parallel(config: Config, world: int | None) -> Iterator[str]:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    what = "parallel.tensor_model_parallel_size"
    groups = num_query_groups(model)
    if tp > groups:
        yield f"{what}: {tp} is more than the {groups} key/value heads (model.num_query_groups); use at most {groups}"
    else:
        key = "num_attention_heads" if model.num_query_groups is None else "num_query_groups"
        yield from _indivisible(f"model.{key}", groups, tp, what)
    if model.num_moe_experts is None or model.first_k_dense_replace > 0:
        yield from _indivisible("model.ffn_hidden_size", model.ffn_hidden_size, tp, what)
    shared = model.moe_shared_expert_intermediate_size
    yield from _indivisible("model.moe_shared_expert_intermediate_size", shared, tp, what)
    padded = padded_vocab_size(model)
    if padded % tp:
        yield (
            f"model.make_vocab_size_divisible_by: the padded vocabulary ({padded}) is not a multiple of {what} ({tp}); "
            f"use a multiple of {tp}"
        )


def _sequence_parallel(config: Config, world: int | None) -> Iterator[str]:
    parallel, tp = config.parallel, config.parallel.tensor_model_parallel_size
    if parallel.sequence_parallel:
        if tp == 1:
            yield "parallel.sequence_parallel: needs tensor_model_parallel_size > 1; set one or the other"
        yield from _indivisible(
            "data.sequence_length", config.data.sequence_length, tp, "parallel.tensor_model_parallel_size"
        )
    elif tp > 1 and config.model.num_moe_experts is not None:
        yield (
            "parallel.sequence_parallel: megatron-core trains experts with tensor parallelism only under sequence "
            "parallelism; set parallel.sequence_parallel=true"
        )


def _expert_parallel(config: Config, world: int | None) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    ep, etp = parallel.expert_model_parallel_size, expert_tensor_parallel_size(parallel)
    tp = parallel.tensor_model_parallel_size
    if model.num_moe_experts is None:
        for name, given in (("model", ep > 1), ("tensor", parallel.expert_tensor_parallel_size is not None)):
            if given:
                yield f"parallel.expert_{name}_parallel_size: the model has no experts; remove it"
        return
    yield from _indivisible("model.num_moe_experts", model.num_moe_experts, ep, "parallel.expert_model_parallel_size")
    yield from _indivisible(
        "model.moe_ffn_hidden_size", model.moe_ffn_hidden_size, etp, "parallel.expert_tensor_parallel_size"
    )
    if ep == 1 and etp != tp:
        yield (
            f"parallel.expert_tensor_parallel_size: {etp} differs from tensor_model_parallel_size ({tp}) without "
            "expert parallelism: megatron-core would not sum the experts' gradients over the TP ranks; "
            f"set it to {tp} or null, or raise parallel.expert_model_parallel_size"
        )
    elif ep > 1 and etp > 1 and config.runtime.platform != "cuda":
        yield (
            f"parallel.expert_tensor_parallel_size: {etp} with expert parallelism runs on GPUs only (gloo has no "
            "uneven all_gather); set it to 1 or null, or runtime.platform=cuda"
        )


def _pipeline(config: Config, world: int | None) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if vpp is not None and pp == 1:
        yield (
            "parallel.virtual_pipeline_model_parallel_size: needs pipeline_model_parallel_size > 1; "
            "set it to null, or use more stages"
        )
    elif parallel.num_layers_per_stage is not None:
        yield from _layers_per_stage(parallel.num_layers_per_stage, layers, pp * (vpp or 1))
    elif layers % (pp * (vpp or 1)):
        what = f"{pp} pipeline stages" + (f" of {vpp} chunks" if vpp else "")
        yield (
            f"model.num_layers: {layers} layers do not divide into {what}; change one of them, or give the layers of "
            "each in parallel.num_layers_per_stage"
        )


def _layers_per_stage(counts: list[int], layers: int, chunks: int) -> Iterator[str]:
    key = "parallel.num_layers_per_stage"
    if chunks == 1:
        yield f"{key}: there is one stage only; set it to null, or use pipeline stages"
    elif len(counts) != chunks:
        yield f"{key}: has {len(counts)} numbers for {chunks} model chunks (PP x VPP); give one for each"
    elif min(counts) < 1 or sum(counts) != layers:
        yield f"{key}: {counts} must be numbers of at least 1 that add up to model.num_layers ({layers})"


RECOMPUTABLE = {
    "core_attn": "any",
    "layernorm": "any",
    "activation": "any",
    "mlp": "dense layers",
    "moe": "experts",
    "shared_experts": "shared experts",
}
"""What selective recomputation knows, and what the model must have for it."""


def _recompute(config: Config, world: int | None) -> Iterator[str]:
    runtime, model, key = config.runtime, config.model, "runtime.recompute_modules"
    selective = runtime.recompute_granularity == "selective"
    if selective and not runtime.recompute_modules:
        yield f"{key}: selective recomputation needs to know of what; give a list of {', '.join(RECOMPUTABLE)}"
    if runtime.recompute_modules and not selective:
        yield f"{key}: is for runtime.recompute_granularity=selective; set that, or empty the list"
    if runtime.recompute_granularity != "full" and runtime.recompute_num_layers != 1:
        yield "runtime.recompute_num_layers: is for runtime.recompute_granularity=full; set that, or this to 1"
    if runtime.recompute_granularity == "full" and model.mtp_num_layers and runtime.recompute_num_layers != 1:
        yield "runtime.recompute_num_layers: megatron-core recomputes MTP layers one by one only; set it to 1"
    has = {
        "any": True,
        "dense layers": model.num_moe_experts is None or model.first_k_dense_replace > 0,
        "experts": model.num_moe_experts is not None,
        "shared experts": model.moe_shared_expert_intermediate_size is not None,
    }
    for name in runtime.recompute_modules:
        if name not in RECOMPUTABLE:
            yield f"{key}: {name!r} is none of {', '.join(RECOMPUTABLE)}"
        elif not has[RECOMPUTABLE[name]]:
            yield f"{key}: {name!r} is of no use, the model has no {RECOMPUTABLE[name]}; remove it"


def _context_parallel(config: Config, world: int | None) -> Iterator[str]:
    if config.parallel.context_parallel_size > 1:
        yield "parallel.context_parallel_size: context parallelism is not built and proved yet; set it to 1"


def _overlap(config: Config, world: int | None) -> Iterator[str]:
    parallel = config.parallel
    if not parallel.overlap_param_gather:
        return
    for name in ("overlap_grad_reduce", "use_distributed_optimizer"):
        if not getattr(parallel, name):
            yield f"parallel.overlap_param_gather: needs parallel.{name}; set that to true, or this one to false"


def _world(config: Config, world: int | None) -> Iterator[str]:
    """The ranks, where their number is known, and the batch that they share."""
    parallel, train = config.parallel, config.train
    if world is None:
        yield from _indivisible(
            "train.global_batch_size", train.global_batch_size, train.micro_batch_size, "train.micro_batch_size"
        )
        yield from _ramp(train, train.micro_batch_size, f"train.micro_batch_size ({train.micro_batch_size})")
        return
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    experts = 1
    if config.model.num_moe_experts is not None:
        experts = expert_tensor_parallel_size(parallel) * parallel.expert_model_parallel_size
    least = math.lcm(tp * parallel.context_parallel_size, experts) * pp
    layout = f"TP {tp} x PP {pp}" + (f", experts on {experts} ranks" if experts > 1 else "")
    if world < least:
        yield f"parallel: the layout ({layout}) needs at least {least} ranks, got {world}: start with --nproc {least}"
    elif world % least:
        yield f"parallel: {world} ranks are not a multiple of {least}, which the layout ({layout}) needs; change one"
    else:
        yield from _batch(config, world)


def _batch(config: Config, world: int) -> Iterator[str]:
    train, pp = config.train, config.parallel.pipeline_model_parallel_size
    replicas = data_parallel_size(config.parallel, world)
    per_pass = train.micro_batch_size * replicas
    what = f"micro_batch_size ({train.micro_batch_size}) x data-parallel ranks ({replicas})"
    if config.parallel.virtual_pipeline_model_parallel_size:
        yield from _ramp(train, per_pass * pp, f"{what} x pipeline stages ({pp}), which are interleaved")
    else:
        yield from _ramp(train, per_pass, what)
    if train.global_batch_size % per_pass:
        yield (f"train.global_batch_size: {train.global_batch_size} is not a multiple of {what}; change one of them")
    elif config.parallel.virtual_pipeline_model_parallel_size and num_microbatches(config, world) % pp:
        count = num_microbatches(config, world)
        yield (
            f"train.global_batch_size: interleaved pipeline stages need a multiple of {pp} microbatches, got {count}; "
            "change the batch sizes or the virtual stages"
        )


def _ramp(train: TrainConfig, unit: int, what: str) -> Iterator[str]:
    """The ramp of the batch; every batch on the way must be a multiple of `unit`, which messages call `what`."""
    ramp, full, key = train.rampup_batch_size, train.global_batch_size, "train.rampup_batch_size"
    if ramp is None:
        return
    if len(ramp) != 3 or not all(1 <= value <= LARGEST_INT for value in ramp):
        yield (
            f"{key}: expected [start, increment, samples], numbers from 1 to {LARGEST_INT}, got {ramp}; "
            "write null for a constant batch"
        )
        return
    start, increment, _ = ramp
    if start >= full:
        yield f"{key}: start {start} is not less than train.global_batch_size ({full}); lower it, or write null"
    elif (full - start) % increment:
        yield (
            f"{key}: steps of {increment} from {start} do not reach train.global_batch_size ({full}); "
            f"use an increment that divides {full - start}"
        )
    else:
        for name, value in (("start", start), ("increment", increment)):
            if value % unit:
                yield f"{key}: {name} {value} is not a multiple of {what}; change one of them"


LAYOUT_RULES = (
    _tensor_parallel,
    _sequence_parallel,
    _expert_parallel,
    _pipeline,
    _context_parallel,
    _overlap,
    _recompute,
    _world,
)
