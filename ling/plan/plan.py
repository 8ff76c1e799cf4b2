"""A plan: everything that is predicted of one config on one cluster, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ling.config import check_config
from ling.config.derived import consumed_samples_after, num_microbatches
from ling.config.errors import UserError
from ling.config.schema import Config
from ling.model.counts import ParameterCount, flops_per_token
from ling.plan.activations import Storage
from ling.plan.cluster import Cluster
from ling.plan.layout import Layout, ModelShapes, make_layout
from ling.plan.memory import FRAGMENTATION, StageMemory, fullest, memory_of, states_of
from ling.plan.reliability import Reliability, reliability
from ling.plan.timing import Efficiency, StepTime, Timing

IMBALANCE = 1.1
"""Rows of the rank whose experts get the most, over the mean, where nothing else is said."""


@dataclass(frozen=True)
class Plan:
    """What is predicted. Memory in bytes, times in seconds; `memory` and `parameters` have one entry per stage.

    Steps are those of the full global batch; `useful_s` is the time of all steps, those of a growing batch
    (train.rampup_batch_size) as they are, without saves and failures.
    """

    config: Config
    cluster: Cluster
    layout: Layout
    counts: ParameterCount
    imbalance: float
    microbatches: int
    parameters: tuple[int, ...]
    memory: tuple[StageMemory, ...]
    step: StepTime
    useful_s: float
    reliability: Reliability
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's memory is enough."""
        return self.over_gib <= 0

    @property
    def over_gib(self) -> float:
        """What the fullest rank lacks; negative: what it has to spare."""
        return fullest(self.memory)[1].needed / 2**30 - self.cluster.gpu.memory_gib

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.config.train.global_batch_size * self.config.data.sequence_length

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all ranks."""
        return self.tokens_per_step / self.step.total

    @property
    def mfu(self) -> float:
        """Model FLOPs over the dense bf16 peak, as a fraction; recomputation is no model FLOP."""
        flops = flops_per_token(self.config.model, self.config.data.sequence_length).total
        return self.tokens_per_s * flops / (self.layout.world * self.cluster.gpu.peak_bf16_tflops * 1e12)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return consumed_samples_after(self.config, self.config.train.train_iters) * self.config.data.sequence_length

    @property
    def run_s(self) -> float:
        """Wall time of the whole run, saves and failures included; infinite where failures leave no progress."""
        return self.useful_s / self.reliability.goodput if self.reliability.goodput else float("inf")

    @property
    def gpu_hours(self) -> float:
        """`run_s` times the ranks."""
        return self.run_s * self.layout.world / 3600


def make_plan(
    config: Config,
    cluster: Cluster,
    world: int,
    *,
    imbalance: float = IMBALANCE,
    efficiency: Efficiency | None = None,
    shapes: ModelShapes | None = None,
) -> Plan:
    """Plan a run.

    Raises:
        UserError: the settings do not fit each other or the number of ranks.
    """
    notes = checked(config, world)
    shapes = shapes or ModelShapes(config.model)
    layout = make_layout(config, world)
    imbalance = imbalance if config.model.num_moe_experts else 1.0
    storage = Storage.of(config)
    held = states_of(config, layout, shapes, storage)
    step = Timing(config, layout, cluster, efficiency, imbalance).step(held)
    useful = step.total * config.train.train_iters
    if config.train.rampup_batch_size is not None:
        first = _changed(config, "train", {"global_batch_size": config.train.rampup_batch_size[0]})
        useful = _with_ramp(config, Timing(first, layout, cluster, efficiency, imbalance).step(held), step)
    return Plan(
        config=config,
        cluster=cluster,
        layout=layout,
        counts=shapes.counts,
        imbalance=imbalance,
        microbatches=num_microbatches(config, world),
        parameters=tuple(own.parameters for own in held),
        memory=tuple(memory_of(config, layout, held, storage, imbalance)),
        step=step,
        useful_s=useful,
        reliability=reliability(config, cluster, world, step.total, shapes.counts.total),
        notes=tuple(notes),
    )


def _with_ramp(config: Config, first: StepTime, full: StepTime) -> float:
    """Time of all steps, given the first one of the ramp and a full one: a step's time is linear in its sequences."""
    train = config.train
    assert train.rampup_batch_size is not None
    start = train.rampup_batch_size[0]
    per_sequence = (full.total - first.total) / (train.global_batch_size - start)
    further = consumed_samples_after(config, train.train_iters) - start * train.train_iters
    return first.total * train.train_iters + per_sequence * further


def checked(config: Config, world: int) -> list[str]:
    """Check the config for so many ranks, on GPUs; what only `ling train` would refuse comes back as notes.

    Raises:
        UserError: the settings do not fit each other or the number of ranks.
    """
    for_gpus = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, platform="cuda"))
    recipe = config.precision.recipe
    neutral = dataclasses.replace(for_gpus, precision=dataclasses.replace(config.precision, recipe="bf16"))
    try:
        check_config(neutral, world)
    except UserError as error:
        raise UserError(str(error).replace("start with --nproc", "plan with --world")) from None
    if recipe == "auto":
        config.precision.recipe = "bf16"  # what auto means on the GPUs that are planned for
    try:
        check_config(for_gpus, world)
    except UserError as error:
        return [f"`ling train` would refuse this: {error}"]
    return []


def mends(plan: Plan) -> list[str]:
    """What would make a plan fit, or leave it room: settings to change, the cheapest first, each tried out."""
    config = plan.config
    tries: list[tuple[str, Any]] = []
    runtime, parallel, train = config.runtime, config.parallel, config.train
    if train.micro_batch_size > 1:
        tries.append(("train.micro_batch_size", train.micro_batch_size // 2))
    moe = config.model.num_moe_experts is not None
    if runtime.recompute_granularity == "none":
        light = ["activation", "layernorm"]
        tries.append(("runtime", {"recompute_granularity": "selective", "recompute_modules": light}))
        if moe:
            tries.append(("runtime", {"recompute_granularity": "selective", "recompute_modules": ["moe", "layernorm"]}))
    if runtime.recompute_granularity != "full":
        full: dict[str, Any] = {"recompute_granularity": "full", "recompute_modules": []}
        tries.append(("runtime", full))
    if not parallel.use_distributed_optimizer:
        tries.append(("parallel.use_distributed_optimizer", True))
    if moe and parallel.expert_model_parallel_size < plan.cluster.node.gpus:
        tries.append(("parallel.expert_model_parallel_size", plan.cluster.node.gpus))
    found = []
    for key, value in tries:
        changed = _changed(config, key, value)
        try:
            other = make_plan(changed, plan.cluster, plan.layout.world, imbalance=plan.imbalance)
        except UserError:
            continue
        if other.over_gib < plan.over_gib - 0.1:
            slower = other.step.total / plan.step.total - 1
            found.append(f"{_setting(key, value)}: {_room(other)}, {slower:+.0%} time per step")
    return found


def _changed(config: Config, key: str, value: Any) -> Config:
    branch, _, leaf = key.partition(".")
    values = {leaf: value} if leaf else value
    return dataclasses.replace(config, **{branch: dataclasses.replace(getattr(config, branch), **values)})


def _setting(key: str, value: Any) -> str:
    if isinstance(value, dict):
        rows = {name: f"[{','.join(row)}]" if isinstance(row, list) else row for name, row in value.items()}
        return " ".join(f"{key}.{name}={row}" for name, row in rows.items() if row != "[]")
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def _room(plan: Plan) -> str:
    return f"fits with {-plan.over_gib:.1f} GiB to spare" if plan.fits else f"still lacks {plan.over_gib:.1f} GiB"


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for machines; bytes, seconds, tokens and fractions."""
    stage, worst = fullest(plan.memory)
    kinds = dataclasses.asdict(plan.step.kinds)
    return {
        "fits": plan.fits,
        "world": plan.layout.world,
        "cluster": plan.cluster.name,
        "layout": {name: getattr(plan.layout, name) for name in ("tp", "pp", "vpp", "ep", "etp", "dp", "edp")},
        "microbatches": plan.microbatches,
        "imbalance": plan.imbalance,
        "parameters": {"total": plan.counts.total, "activated": plan.counts.activated},
        "stages": [
            {
                "layers": [list(chunk.layers) for chunk in held.chunks],
                "embedding": any(chunk.embedding for chunk in held.chunks),
                "head": any(chunk.head for chunk in held.chunks),
                "mtp": any(chunk.mtp for chunk in held.chunks),
                "parameters": parameters,
                "memory": dataclasses.asdict(memory) | {"allocated": memory.allocated, "needed": memory.needed},
            }
            for held, parameters, memory in zip(plan.layout.stages, plan.parameters, plan.memory, strict=True)
        ],
        "fullest_stage": stage,
        "needed_gib": worst.needed / 2**30,
        "memory_gib": plan.cluster.gpu.memory_gib,
        "fragmentation": FRAGMENTATION,
        "step": dataclasses.asdict(plan.step) | {"kinds": kinds, "total": plan.step.total},
        "tokens_per_s": plan.tokens_per_s,
        "tokens_per_s_per_device": plan.tokens_per_s / plan.layout.world,
        "mfu": plan.mfu,
        "tokens": plan.tokens,
        "run_s": plan.run_s,
        "gpu_hours": plan.gpu_hours,
        "reliability": dataclasses.asdict(plan.reliability),
        "notes": list(plan.notes),
    }
