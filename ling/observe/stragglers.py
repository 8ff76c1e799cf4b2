"""Ranks that keep the others waiting: every rank's own work is timed, gathered every few steps, and outliers are named.

Timed are the forward and backward passes of a rank's micro-batches, each from taking the batch to the end of its loss,
and from the first gradient to the last one; not what comes between: the pipeline's sends and receives, the reduction of
gradients, the sum of the losses, the optimizer. There ranks wait for each other, so a whole step takes the same time on
all of them. What this cannot see:
- Tensor- and expert-parallel ranks wait for each other inside their layers. A slow one makes its whole group slow, and
  the group is named.
- Pipeline stages have different work, so a rank is compared with those of its own stage. A stage of one rank, or of one
  such group, has nobody to be compared with.
- The optimizer's own work, saving and evaluating, and what is slow in fewer than half of the steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from ling.config.schema import ObserveConfig
from ling.parallel import groups
from ling.platform import Platform, Stopwatch

MAX_NAMED = 16


@dataclass(frozen=True)
class SlowRank:
    """A rank, its machine, its milliseconds of work per step, and these over the middle rank's of its stage."""

    rank: int
    node: str
    busy_ms: float
    ratio: float


class PassTimers:
    """What megatron-core calls as `config.timers`: a stopwatch for the passes, nothing for its other timers."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._passes, self._others = stopwatch, _NoStopwatch()

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        return self._passes if name in ("forward-compute", "backward-compute") else self._others


class _NoStopwatch:
    def start(self, barrier: bool = False) -> None:
        """Nothing to start."""

    def stop(self, barrier: bool = False) -> None:
        """Nothing to stop."""


class Stragglers:
    """Times this rank's passes, and every `observe.straggler_interval` steps compares them with all other ranks'."""

    def __init__(self, settings: ObserveConfig, world: groups.World, platform: Platform, node: str) -> None:
        self.is_on = settings.straggler_interval > 0 and world.size > 1
        self._interval, self._factor = settings.straggler_interval, settings.straggler_factor
        self._world, self._device, self._node = world, platform.device, node
        self._stopwatch = platform.stopwatch()
        self._steps_ms: list[float] = []
        self._nodes: list[str] = []
        self._stages: list[int] = []

    def timers(self) -> PassTimers | None:
        """For megatron-core's config."""
        return PassTimers(self._stopwatch) if self.is_on else None

    def begin_step(self) -> None:
        """Forget what was timed before the step, such as an evaluation."""
        if self.is_on:
            self._stopwatch.reset()

    def end_step(self, step: int) -> dict[str, Any] | None:
        """Note the step; called on all ranks, after the device has finished. The record for `metrics.jsonl` on all
        ranks where the interval is over, else None."""
        if not self.is_on:
            return None
        self._steps_ms.append(self._stopwatch.total_ms())
        if step % self._interval:
            return None
        mine = torch.tensor([statistics.median(self._steps_ms)], dtype=torch.float32, device=self._device)
        self._steps_ms.clear()
        if not self._nodes:
            self._meet()
        everyone = torch.empty(self._world.size, dtype=torch.float32, device=self._device)
        dist.all_gather_into_tensor(everyone, mine)
        return metrics_record(step, everyone.tolist(), self._nodes, self._stages, self._factor)

    def _meet(self) -> None:
        """Learn every rank's machine and stage, once."""
        everyone: list[Any] = [None] * self._world.size
        dist.all_gather_object(everyone, (self._node, groups.pipeline().rank))
        self._nodes, self._stages = [node for node, _ in everyone], [stage for _, stage in everyone]


def slow_ranks(busy_ms: Sequence[float], nodes: Sequence[str], stages: Sequence[int], factor: float) -> list[SlowRank]:
    """The ranks that work longer than the others of their stage, the slowest first, at most `MAX_NAMED`.

    Args:
        busy_ms: milliseconds per step in which each rank worked, in the order of the ranks.
        nodes: the machine of each rank.
        stages: the pipeline stage of each rank.
        factor: times the middle rank's time (the lower one of two), from which a rank counts as slow.
    """
    if not len(busy_ms) == len(nodes) == len(stages):
        raise ValueError(f"{len(busy_ms)} times for {len(nodes)} machines and {len(stages)} stages")
    middle = {
        stage: statistics.median_low(ms for ms, of in zip(busy_ms, stages, strict=True) if of == stage)
        for stage in set(stages)
    }
    found = [
        SlowRank(rank, nodes[rank], round(ms, 3), round(ms / middle[stage], 3))
        for rank, (ms, stage) in enumerate(zip(busy_ms, stages, strict=True))
        if middle[stage] > 0 and ms > factor * middle[stage]
    ]
    return sorted(found, key=lambda slow: -slow.ratio)[:MAX_NAMED]


def metrics_record(
    step: int, busy_ms: Sequence[float], nodes: Sequence[str], stages: Sequence[int], factor: float
) -> dict[str, Any]:
    """The line for `metrics.jsonl`, which `ling status` reads; `slow_ranks` is empty where no rank is slow."""
    most = max(range(len(busy_ms)), key=lambda rank: busy_ms[rank])
    return {
        "step": step,
        "busy_ms": {"middle": round(statistics.median_low(busy_ms), 3), "most": round(busy_ms[most], 3), "rank": most},
        "slow_ranks": [asdict(slow) for slow in slow_ranks(busy_ms, nodes, stages, factor)],
    }


def console_line(record: dict[str, Any]) -> str | None:
    """The record for people; None where no rank is slow."""
    found = record["slow_ranks"]
    if not found:
        return None
    ranks = ", ".join(f"rank {slow['rank']} ({slow['node']}) {slow['ratio']:.2f}x" for slow in found[:4])
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return f"step {record['step']}: slow ranks: {ranks}{more} of the time that the middle rank of the stage works"
