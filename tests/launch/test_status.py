"""`ling status`, from files alone."""

import json
import os

import pytest

from ling.cli import main
from ling.config import UserError, load_config, save_config
from ling.launch.status import read_status, show
from ling.launch.stragglers import console_line, metrics_record, slow_ranks

RUN = "configs/runs/tiny_dense.yaml"


@pytest.fixture
def run_dir(tmp_path, request):
    """A run that was killed once at step 12, went on from step 10 and is done at step 20; 100 ms a step."""
    save_config(load_config(request.config.rootpath / RUN, ["train.train_iters=20"]), tmp_path / "config.yaml")
    steps = [
        {"step": step, "loss": 5.0 - step / 10, "step_ms": 100.0, "tokens_per_s": 1000.0, "attempt": 1 + (step > 10)}
        for step in range(1, 21)
    ]
    lines = [*steps, metrics_record(20, slow_ranks([10.0, 10.0, 30.0], ["a", "a", "b"]))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    attempts = [
        {"attempt": 1, "start": 100.0, "end": 103.0, "reason": "hung", "ended": "rank 1 (n2) hung at step 12: x"},
        {"attempt": 2, "start": 110.0, "end": 112.0, "reason": "done", "ended": "was done", "replayed_steps": 2},
    ]
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in attempts))
    (tmp_path / "job" / "outcome.json").write_text(json.dumps({"reason": "done", "step": 20}))
    return tmp_path


def test_a_done_run(run_dir, capsys):
    status = read_status(run_dir)
    assert (status["state"], status["step"], status["train_iters"], status["loss"]) == ("done", 20, 20, 3.0)
    assert (status["step_ms"], status["tokens_per_s"], status["eta_s"]) == (100.0, 1000.0, 0.0)
    assert (status["attempts"], status["ended"]) == (2, {"hung": 1, "done": 1})
    assert status["first_failure"] is None
    assert (status["useful_s"], status["running_s"], status["elapsed_s"]) == (2.0, 5.0, 12.0)
    assert (status["goodput"], status["replayed_steps"]) == (0.4, 2)
    assert status["slow_ranks"] == [{"rank": 2, "node": "b", "busy_ms": 30.0, "ratio": 3.0}]
    assert main(["status", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "step        20 of 20, loss 3.0000\n" in out
    assert "slow        rank 2 (b): 3.00x the middle rank's time\n" in out
    assert "goodput     40.0%: 2 s of steps that count in 5 s of running; 2 steps done again\n" in out
    assert main(["status", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["goodput"] == 0.4


def test_a_running_and_a_silent_run(run_dir):
    (run_dir / "job" / "outcome.json").unlink()
    (run_dir / "job" / "attempt.json").write_text(json.dumps({"attempt": 3, "start": 200.0, "replayed_steps": 1}))
    lease = run_dir / "job" / "lease_3.json"
    lease.write_text(json.dumps({"job": "SLURM job 7", "node": "n1", "pid": 12, "counter": 4}))
    os.utime(lease, (300.0, 300.0))
    status = read_status(run_dir, now=305.0)
    assert (status["state"], status["heartbeat_age_s"], status["attempts"]) == ("running", 5.0, 3)
    assert status["running_s"] == 3.0 + 2.0 + 105.0
    assert status["replayed_steps"] == 3
    assert "running: process 12 on n1 (SLURM job 7), last heard of 5 s ago" in show(status)
    assert read_status(run_dir, now=900.0)["state"] == "silent"
    lease.unlink()
    assert read_status(run_dir, now=900.0)["state"] == "killed"


def test_the_first_failure(run_dir):
    outcome = {"reason": "failed", "rank": 3, "node": "n2", "step": 9, "error": "OSError: y"}
    (run_dir / "job" / "outcome.json").write_text(json.dumps(outcome))
    assert read_status(run_dir)["first_failure"] == "rank 3 (n2) failed at step 9: OSError: y"
    assert "failure     rank 3 (n2) failed at step 9: OSError: y" in show(read_status(run_dir))


def test_a_run_that_has_not_begun(tmp_path):
    with pytest.raises(UserError, match="is no run's folder"):
        read_status(tmp_path)
    (tmp_path / "job").mkdir()
    status = read_status(tmp_path)
    assert (status["state"], status["step"], status["goodput"]) == ("waiting", 0, None)
    assert "none yet" in show(status)


def test_slow_ranks():
    nodes = [f"n{rank // 2}" for rank in range(6)]
    assert slow_ranks([10, 11, 10, 10.5, 10, 11], nodes) == []
    found = slow_ranks([10, 11, 10, 40, 10, 20], nodes)
    assert [(slow.rank, slow.node) for slow in found] == [(3, "n1"), (5, "n2")]
    assert (
        console_line(7, found) == "step 7: slow ranks: rank 3 (n1) 4.00x, rank 5 (n2) 2.00x of the middle rank's time"
    )
    assert slow_ranks([0.0, 0.0], ["a", "b"]) == []
    assert len(slow_ranks([1.0] * 41 + [2.0] * 40, ["n"] * 81)) == 16
    with pytest.raises(ValueError, match="1 times for 2 ranks"):
        slow_ranks([1.0], ["a", "b"])
