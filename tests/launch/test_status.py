"""`ling status`, from files alone."""

import json
import os

import pytest

from ling.cli import main
from ling.config import UserError, load_config, save_config
from ling.launch.status import read_status, show
from ling.observe.stragglers import metrics_record

RUN = "configs/runs/tiny_dense.yaml"


@pytest.fixture
def run_dir(tmp_path, request):
    """A run that was killed once at step 12, went on from step 10 and is done at step 20; 100 ms a step."""
    save_config(load_config(request.config.rootpath / RUN, ["train.train_iters=20"]), tmp_path / "config.yaml")
    steps = [
        {"step": step, "loss": 5.0 - step / 10, "step_ms": 100.0, "tokens_per_s": 1000.0, "attempt": 1 + (step > 10)}
        for step in range(1, 21)
    ]
    lines = [*steps, metrics_record(20, [10.0, 10.0, 30.0], ["a", "a", "b"], [0, 0, 0], 1.15)]
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
    assert "restarts    1; attempts that are over: 1 hung, 1 done\n" in out
    assert "slow        rank 2 (b): 3.00x the time that the middle rank of its stage works (30 ms a step)\n" in out
    assert "goodput     40.0%: 2 s of steps that count in 5 s of running; 2 steps done again\n" in out
    assert main(["status", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["goodput"] == 0.4


def test_a_running_and_a_silent_run(run_dir):
    (run_dir / "job" / "outcome.json").unlink()
    current = {"attempt": 3, "start": 200.0, "replayed_steps": 1, "node": "n1", "job": "7"}
    (run_dir / "job" / "attempt.json").write_text(json.dumps(current))
    lease = run_dir / "job" / "lease_3.json"
    lease.write_text(json.dumps({"job": "SLURM job 7", "node": "n1", "pid": 12, "counter": 4}))
    os.utime(lease, (300.0, 300.0))
    status = read_status(run_dir, now=305.0)
    assert (status["state"], status["heartbeat_age_s"], status["attempts"]) == ("running", 5.0, 3)
    assert status["running_s"] == 3.0 + 2.0 + 105.0
    assert status["replayed_steps"] == 3
    assert "running: process 12 on n1 (SLURM job 7), last heard of 5 s ago" in show(status)
    assert read_status(run_dir, now=900.0)["state"] == "silent"
    (run_dir / "job" / "outcome.json").write_text('{"reason": "failed", "rank": 1, "node": "n2", "error": "x"}')
    (run_dir / "job" / "attempt.json").unlink()
    assert read_status(run_dir, now=305.0)["state"] == "failed"  # the lease was left behind
    (run_dir / "job" / "outcome.json").unlink()
    (run_dir / "job" / "attempt.json").write_text(json.dumps(current))
    lease.unlink()
    status = read_status(run_dir, now=900.0)
    assert status["state"] == "killed"
    assert status["first_failure"] == "attempt 3 of SLURM job 7, led by n1, was killed, or its machine failed"


def test_the_first_failure(run_dir):
    outcome = {"reason": "failed", "rank": 3, "node": "n2", "step": 9, "error": "OSError: y"}
    (run_dir / "job" / "outcome.json").write_text(json.dumps(outcome))
    assert read_status(run_dir)["first_failure"] == "rank 3 (n2) failed at step 9: OSError: y"
    assert "failure     rank 3 (n2) failed at step 9: OSError: y" in show(read_status(run_dir))


def test_a_failure_is_told_once(run_dir):
    outcome = {"reason": "failed", "rank": 3, "node": "n2", "step": 9, "error": "OSError: y"}
    (run_dir / "job" / "outcome.json").write_text(json.dumps(outcome))
    reason = "rank 3 (n2) failed at step 9: OSError: y; 3 starts in a row found no checkpoint: giving up"
    told = {"word": "stop", "reason": reason, "nodes": [], "job": "7", "start": 3, "time": 125.0}
    (run_dir / "job" / "answer.json").write_text(json.dumps(told))
    assert "job file    gave up: 3 starts in a row found no checkpoint: giving up (job 7" in show(read_status(run_dir))


def test_why_it_stopped(run_dir):
    outcome = {"reason": "stopped", "step": 14, "cause": "SIGTERM", "signal": "SIGTERM"}
    (run_dir / "job" / "outcome.json").write_text(json.dumps(outcome))
    assert read_status(run_dir)["state"] == "stopped"
    assert "state       stopped at step 14 (SIGTERM)\n" in show(read_status(run_dir))


def test_a_run_that_has_not_begun(tmp_path):
    with pytest.raises(UserError, match="is no run's folder"):
        read_status(tmp_path)
    (tmp_path / "job").mkdir()
    status = read_status(tmp_path)
    assert (status["state"], status["step"], status["goodput"]) == ("waiting", 0, None)
    assert "none yet" in show(status)


def test_a_rank_that_is_slow_no_more(run_dir):
    record = metrics_record(20, [10.0, 10.0, 10.0], ["a", "a", "b"], [0, 0, 0], 1.15)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    assert read_status(run_dir)["slow_ranks"] == []


def test_a_job_file_between_its_start_and_training(run_dir):
    os.utime(run_dir / "job" / "outcome.json", (112.0, 112.0))
    starts = [{"job": "7", "start": number, "time": time, "step": 10} for number, time in ((0, 90.0), (1, 120.0))]
    path = run_dir / "job" / "starts.jsonl"
    path.write_text("".join(json.dumps(start) + "\n" for start in starts))
    status = read_status(run_dir, now=150.0)
    assert (status["state"], status["starting_s"], status["answer"]) == ("starting", 30.0, None)
    assert "starting since 30 s: checks before training, or killed in them\n" in show(status)
    os.utime(run_dir / "job" / "outcome.json", None)  # a start that ended without an attempt, such as wrong input
    assert read_status(run_dir, now=150.0)["state"] == "done"


def test_what_the_job_file_was_told(run_dir):
    (run_dir / "job" / "starts.jsonl").write_text('{"job": "7", "start": 3, "time": 120.0, "step": 10}\n')
    told = {"word": "exclude", "reason": "n2: 7 of 8 GPUs are there", "nodes": ["n2"], "job": "7", "start": 3}
    path = run_dir / "job" / "answer.json"
    path.write_text(json.dumps(told | {"time": 125.0}))
    text = "job file    was told to start again without n2: n2: 7 of 8 GPUs are there (job 7, start 3)\n"
    assert text in show(read_status(run_dir))
    path.write_text(json.dumps(told | {"word": "stop", "nodes": [], "reason": "x: giving up", "time": 125.0}))
    assert "job file    gave up: x: giving up (job 7, start 3)\n" in show(read_status(run_dir))
    path.write_text(json.dumps(told | {"time": 119.0}))  # of the start before
    assert read_status(run_dir)["answer"] is None
    path.write_text(json.dumps(told | {"word": "done", "nodes": [], "time": 125.0}))
    assert "job file" not in show(read_status(run_dir))


def test_a_job_that_never_trained(tmp_path):
    (tmp_path / "job").mkdir()
    told = {"word": "stop", "reason": "n1: no nvidia-smi, where 8 GPUs should be", "nodes": [], "job": "7", "start": 0}
    (tmp_path / "job" / "starts.jsonl").write_text('{"job": "7", "start": 0, "time": 120.0, "step": 0}\n')
    (tmp_path / "job" / "answer.json").write_text(json.dumps(told | {"time": 125.0}))
    status = read_status(tmp_path)
    assert (status["state"], status["attempts"]) == ("failed", 0)
    assert "job file    gave up: n1: no nvidia-smi, where 8 GPUs should be (job 7, start 0)" in show(status)
