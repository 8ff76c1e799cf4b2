"""A rank that a plugin makes slow is named: on the console, in metrics.jsonl and by `ling status`."""

from __future__ import annotations

import json

from ling.observe.metrics import read_metrics
from tests.e2e.cli import complete, ling, start

SLOW_RANK = """
import os, time
from ling.trainer import Trainer
forward = Trainer._forward
def slowly(self, *args):
    time.sleep(0.2)
    return forward(self, *args)
if os.environ.get("RANK") == "1":
    Trainer._forward = slowly
"""
OVERRIDES = ("train.eval_interval=0", "observe.straggler_interval=3", "observe.straggler_factor=3")


def test_a_slow_rank(place):
    (place / "slow_rank.py").write_text(SLOW_RANK)
    settings = [*OVERRIDES, "run.dir=straggling", "run.plugins=[slow_rank.py]"]
    done = complete(start("train", "run.yaml", "--nproc", "2", *settings, cwd=place))
    assert done.code == 0, done
    records = [record for record in read_metrics(place / "straggling") if "slow_ranks" in record]
    assert [record["step"] for record in records] == [3, 6]
    assert [[slow["rank"] for slow in record["slow_ranks"]] for record in records] == [[1], [1]]
    node = records[-1]["slow_ranks"][0]["node"]
    assert done.out.count(f"slow ranks: rank 1 ({node}) ") == 2
    (named,) = json.loads(ling("status", "straggling", "--json", cwd=place).out)["slow_ranks"]
    assert named == records[-1]["slow_ranks"][0]
    assert f"slow        rank 1 ({node}): " in ling("status", "straggling", cwd=place).out


def test_no_slow_rank(place):
    done = complete(start("train", "run.yaml", "--nproc", "2", *OVERRIDES, "run.dir=even", cwd=place))
    assert done.code == 0, done
    assert "slow ranks" not in done.out
    records = [record for record in read_metrics(place / "even") if "slow_ranks" in record]
    assert [record["slow_ranks"] for record in records] == [[], []]
    assert json.loads(ling("status", "even", "--json", cwd=place).out)["slow_ranks"] == []
    assert "slow" not in ling("status", "even", cwd=place).out
