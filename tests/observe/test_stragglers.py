"""Slow ranks: the arithmetic, and what a run's ranks find out about each other."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ling.config.schema import ObserveConfig
from ling.observe.loggers import JsonlLogger, Loggers
from ling.observe.metrics import read_metrics
from ling.observe.stragglers import PassTimers, console_line, metrics_record, slow_ranks
from ling.parallel.groups import World
from ling.platform import get_platform
from tests.dist.training import DENSE, build_trainer, tiny_config

STEPS, INTERVAL = 6, 3
SLOW_S = 0.15
"""Many times what a forward pass of these models takes."""


def test_slow_ranks():
    nodes, one = [f"n{rank // 2}" for rank in range(6)], [0] * 6
    assert slow_ranks([10, 11, 10, 10.5, 10, 11], nodes, one, 1.15) == []
    found = slow_ranks([10, 11, 10, 40, 10, 20], nodes, one, 1.15)
    assert [(slow.rank, slow.node, slow.ratio) for slow in found] == [(3, "n1", 4.0), (5, "n2", 2.0)]
    assert slow_ranks([0.0, 0.0], ["a", "b"], [0, 0], 1.15) == []
    assert len(slow_ranks([1.0] * 41 + [2.0] * 40, ["n"] * 81, [0] * 81, 1.15)) == 16
    with pytest.raises(ValueError, match="1 times for 2 machines and 2 stages"):
        slow_ranks([1.0], ["a", "b"], [0, 0], 1.15)


def test_a_rank_is_compared_with_its_own_stage():
    nodes, stages = ["a", "a", "b", "b"], [0, 0, 1, 1]
    assert slow_ranks([10, 11, 30, 31], nodes, stages, 1.15) == []
    (slow,) = slow_ranks([10, 15, 30, 31], nodes, stages, 1.15)
    assert (slow.rank, slow.ratio) == (1, 1.5)
    assert slow_ranks([10, 30], ["a", "b"], [0, 1], 1.15) == []  # nobody to be compared with


def test_the_record_and_the_line():
    record = metrics_record(7, [10, 11, 10, 40], ["a", "a", "b", "b"], [0] * 4, 1.15)
    assert record == {
        "step": 7,
        "busy_ms": {"middle": 10, "most": 40, "rank": 3},
        "slow_ranks": [{"rank": 3, "node": "b", "busy_ms": 40, "ratio": 4.0}],
    }
    said = "step 7: slow ranks: rank 3 (b) 4.00x of the time that the middle rank of the stage works"
    assert console_line(record) == said
    many = metrics_record(7, [1.0] * 5 + [2.0] * 5, ["n"] * 10, [0] * 10, 1.15)
    assert "rank 8 (n) 2.00x and 1 more of" in str(console_line(many))
    assert console_line(metrics_record(7, [10, 10], ["a", "b"], [0, 0], 1.15)) is None


def test_only_the_passes_are_timed():
    stopwatch = get_platform("cpu").stopwatch()
    timers = PassTimers(stopwatch)
    for name in ("forward-recv", "forward-backward", "all-grads-sync"):
        timers(name, log_level=1).start(barrier=False)
        time.sleep(0.02)
        timers(name).stop()
    assert stopwatch.total_ms() == 0.0
    for name in ("forward-compute", "backward-compute"):
        timers(name, log_level=2).start()
        time.sleep(0.02)
        timers(name).stop()
    assert stopwatch.total_ms() >= 40.0
    stopwatch.reset()
    assert stopwatch.total_ms() == 0.0


def run(run_dir: Path, slow: int | None, interval: int = INTERVAL, **parallel: int) -> None:
    """Train some steps; rank `slow` sleeps in each of its forward passes."""
    settings = {"straggler_interval": interval, "straggler_factor": 3.0}
    train = {"train_iters": STEPS, "eval_interval": 0, "global_batch_size": 8}
    config = tiny_config(2, DENSE, parallel=parallel, observe=settings, train=train, checkpoint={"save_interval": 0})
    loggers = Loggers([JsonlLogger(run_dir, 0)] if World.from_environment().is_main else [])
    trainer = build_trainer(config, run_dir, loggers=loggers)
    trainer.save = lambda final=False: run_dir  # type: ignore[method-assign]
    if trainer.world.rank == slow:
        forward = trainer._forward

        def slowly(*args):
            time.sleep(SLOW_S)
            return forward(*args)

        trainer._forward = slowly  # type: ignore[method-assign]
    trainer.run()


def records_of(run_dir: Path) -> list[dict]:
    return [record for record in read_metrics(run_dir) if "slow_ranks" in record]


def test_a_slow_rank_is_named(ranks, tmp_path):
    ranks.run(2, run, tmp_path, slow=1)
    records = records_of(tmp_path)
    assert [record["step"] for record in records] == [3, 6]
    for record in records:
        (slow,) = record["slow_ranks"]
        assert slow["rank"] == record["busy_ms"]["rank"] == 1
        # two micro-batches a step; the other rank waits for this one, but does not work in that time
        assert slow["busy_ms"] > 2 * SLOW_S * 1e3 > 3 * record["busy_ms"]["middle"]


@pytest.mark.parametrize("parallel", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_ranks_that_are_alike_are_not_named(ranks, tmp_path, parallel):
    ranks.run(2, run, tmp_path, slow=None, **parallel)
    records = records_of(tmp_path)
    assert [record["slow_ranks"] for record in records] == [[], []]
    assert all(record["busy_ms"]["middle"] > 0 for record in records)


def test_never(ranks, tmp_path):
    ranks.run(2, run, tmp_path, slow=1, interval=0)
    assert records_of(tmp_path) == []
    assert ObserveConfig().straggler_interval > 0
