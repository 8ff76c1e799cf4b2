"""Layouts of a run, ranked by the predicted speed of those that fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ling.config.errors import UserError
from ling.config.schema import Config
from ling.plan.cluster import Cluster
from ling.plan.layout import ModelShapes, balanced_layers
from ling.plan.plan import IMBALANCE, Plan, make_plan

MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("none", ()),
    ("selective", ("activation", "layernorm")),
    ("selective", ("moe", "layernorm")),
    ("full", ()),
)
HEAD_LAYERS = 1.0
"""What a pass through the output layer takes of the last stage, in layers; an MTP layer counts as one more besides."""


@dataclass(frozen=True)
class Found:
    """A layout: its plan, and the settings that give it."""

    plan: Plan
    settings: tuple[str, ...]


def search(config: Config, cluster: Cluster, world: int, *, imbalance: float = IMBALANCE) -> list[Found]:
    """All layouts tried that fit, the fastest first; equal micro-batches and recomputation of the same layout apart.

    Kept from the config: model, global batch, precision, and whether the optimizer is distributed. Tried: TP up to a
    node (with SP), PP, VPP, EP, micro-batches, recomputation; and layers shared out so that the last stage, which has
    the head and the MTP layer, has fewer.
    """
    shapes = ModelShapes(config.model)
    found = []
    for parallel in _layouts(config, cluster, world):
        for micro_batch in MICRO_BATCHES:
            best: Found | None = None
            for recompute in RECOMPUTE:
                candidate = _candidate(config, parallel, micro_batch, recompute)
                if candidate is None:
                    continue
                try:
                    plan = make_plan(candidate, cluster, world, imbalance=imbalance, shapes=shapes)
                except UserError:
                    continue
                if plan.fits and (best is None or plan.step.total < best.plan.step.total):
                    best = Found(plan, tuple(_settings(candidate)))
            if best is not None:
                found.append(best)
    return sorted(found, key=lambda row: row.plan.step.total)


def _layouts(config: Config, cluster: Cluster, world: int) -> Iterator[dict[str, Any]]:
    model = config.model
    for tp in _powers(min(cluster.node.gpus, model.num_query_groups or model.num_attention_heads)):
        for pp in (size for size in range(1, model.num_layers + 1) if world % (tp * size) == 0):
            for vpp, layers in _chunks(config, pp):
                for ep in _powers(model.num_moe_experts or 1):
                    if ep > 1 and world // pp % ep:
                        continue
                    yield {
                        "tensor_model_parallel_size": tp,
                        "sequence_parallel": tp > 1,
                        "pipeline_model_parallel_size": pp,
                        "virtual_pipeline_model_parallel_size": vpp,
                        "num_layers_per_stage": layers,
                        "expert_model_parallel_size": ep,
                        "expert_tensor_parallel_size": None,
                    }


def _powers(largest: int) -> Iterator[int]:
    size = 1
    while size <= largest:
        yield size
        size *= 2


def _chunks(config: Config, pp: int) -> Iterator[tuple[int | None, list[int] | None]]:
    """Virtual stages and layers of each chunk: equal where they divide, and balanced."""
    model = config.model
    if pp == 1:
        yield None, None
        return
    extra = (1 + model.mtp_num_layers) * HEAD_LAYERS + model.mtp_num_layers
    for vpp in (None, 2, 4):
        chunks = pp * (vpp or 1)
        if chunks > model.num_layers:
            return
        even = model.num_layers % chunks == 0
        if even:
            yield vpp, None
        layers = balanced_layers(model, chunks, extra)
        if min(layers) >= 1 and not (even and len(set(layers)) == 1):
            yield vpp, layers


def _candidate(
    config: Config, parallel: dict[str, Any], micro_batch: int, recompute: tuple[str, tuple[str, ...]]
) -> Config | None:
    if config.train.global_batch_size % micro_batch:
        return None
    granularity, modules = recompute
    if "moe" in modules and config.model.num_moe_experts is None:
        return None
    runtime = dataclasses.replace(
        config.runtime, recompute_granularity=granularity, recompute_modules=list(modules), recompute_num_layers=1
    )
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, **parallel),
        train=dataclasses.replace(config.train, micro_batch_size=micro_batch),
        runtime=runtime,
    )


def _settings(config: Config) -> Iterator[str]:
    """The overrides that give a layout."""
    parallel, runtime = config.parallel, config.runtime
    for name in (
        "tensor_model_parallel_size",
        "sequence_parallel",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "num_layers_per_stage",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    ):
        yield f"parallel.{name}={_shown(getattr(parallel, name))}"
    yield f"train.micro_batch_size={config.train.micro_batch_size}"
    yield f"runtime.recompute_granularity={runtime.recompute_granularity}"
    yield f"runtime.recompute_modules={_shown(runtime.recompute_modules)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower()
