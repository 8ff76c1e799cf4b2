"""Checkpoints and failures: size, write time, how often to save, and the share of the time that makes progress."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ling.config.schema import Config
from ling.plan.activations import Storage
from ling.plan.cluster import Cluster


@dataclass(frozen=True)
class Reliability:
    """What saving and failing cost a run.

    mtbf_s: mean time between failures of the whole job. best_interval_s: Young/Daly's, sqrt(2 · save_s · mtbf_s);
    best_save_interval: the same in steps. goodput: share of the wall time that makes progress, with the config's own
    `checkpoint.save_interval`; best_goodput: with the best one.
    """

    checkpoint_bytes: int
    save_s: float
    mtbf_s: float
    best_interval_s: float
    best_save_interval: int
    goodput: float
    best_goodput: float


def goodput(interval_s: float, save_s: float, mtbf_s: float, restart_s: float) -> float:
    """Share of the wall time that makes progress when training stops to save every so many seconds.

    A save costs `save_s` per interval; a failure costs the restart and, on average, half of what lies between two
    saves. First order in interval / mtbf, and never below 0.
    """
    lost = (restart_s + (interval_s + save_s) / 2) / mtbf_s
    return max(0.0, (1 - lost) * interval_s / (interval_s + save_s))


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Size of a checkpoint: every parameter once in the model's format, and its optimizer state."""
    storage = Storage.of(config)
    master = storage.master or 4  # an fp32 model's weights are saved with the optimizer's moments as well
    return int(parameters * (storage.weight + master + storage.moments))


def reliability(config: Config, cluster: Cluster, world: int, step_s: float, parameters: int) -> Reliability:
    """The checkpoints of a run of a model of so many parameters, whose steps take so long."""
    size = checkpoint_bytes(config, parameters)
    nodes = math.ceil(world / cluster.node.gpus)
    rate = min(cluster.storage.write_gb_s, nodes * cluster.storage.write_gb_s_per_node) * 1e9
    save = size / rate
    mtbf = cluster.reliability.gpu_mtbf_hours * 3600 / world
    restart = cluster.reliability.restart_minutes * 60
    best = math.sqrt(2 * save * mtbf)
    steps = config.checkpoint.save_interval or config.train.train_iters
    return Reliability(
        checkpoint_bytes=size,
        save_s=save,
        mtbf_s=mtbf,
        best_interval_s=best,
        best_save_interval=max(1, round(best / step_s)),
        goodput=goodput(steps * step_s, save, mtbf, restart),
        best_goodput=goodput(max(best, step_s), save, mtbf, restart),
    )
