"""`ling eval` on files and on the run's own parts, held against the evaluation during training."""

import json
from pathlib import Path

import pytest

from ling.observe.metrics import read_metrics
from tests.e2e.cli import ling

SPLIT = ["train", "run.yaml", "run.dir=split", "data.valid=null", "data.split=[0.8,0.1,0.1]", "precision.recipe=fp32"]
SAMPLES = 8  # of one evaluation during training: two batches of four


def losses(place: Path, *argv: str) -> dict[str, float]:
    done = ling("eval", *argv, "--json", cwd=place)
    assert done.code == 0, done
    return {name: found["loss"] for name, found in json.loads(done.out)["results"].items()}


def test_a_run_on_its_own_parts_of_the_data(place):
    done = ling(*SPLIT, "train.train_iters=2", "data.train=[train,{path: valid, name: second}]", cwd=place)
    assert done.code == 0, done
    (record,) = [record for record in read_metrics(place / "split") if "eval" in record]
    assert list(record["eval"]) == ["train", "second"]
    few = ["--max-samples", str(SAMPLES)]
    assert losses(place, "split", "--split", "valid", *few) == pytest.approx(record["eval"], rel=1e-5)
    test = losses(place, "split", "--split", "test", *few)
    assert list(test) == ["train", "second"]
    assert all(abs(test[name] - record["eval"][name]) > 1e-4 for name in test), "other documents"


def test_a_run_on_held_out_files(place, finished):
    *_, record = [record for record in read_metrics(finished[0]) if "eval" in record]
    found = losses(place, "finished", "--split", "valid", "--max-samples", str(SAMPLES))
    assert found == pytest.approx(record["eval"], rel=2e-3)  # one pass of other sizes, in bf16 where that is fast
    done = ling("eval", "finished", "--split", "test", cwd=place)
    assert (done.code, done.out) == (2, "")
    assert done.err == "ling: error: --split test: the run has no data.test; name files with --data\n"
