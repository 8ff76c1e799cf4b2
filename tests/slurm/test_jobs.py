"""The rendered job file under a real SLURM: two nodes, interruptions of every kind, and the same losses after them."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.slurm.cluster import ROOT, Job
from tests.slurm.conftest import SAVE_INTERVAL, STEPS

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
ENDLESS = ("train.train_iters=10000", "checkpoint.save_interval=0")


def test_two_nodes_train_without_interruption(uninterrupted, reference):
    job = uninterrupted
    assert sorted(reference) == list(range(1, STEPS + 1))
    (attempt,) = job.attempts()
    assert (attempt["reason"], attempt["nodes"], attempt["world_size"]) == ("done", 2, 2)
    assert attempt["job"] == job.number
    folder = job.run_dir / "job"
    ranks = json.loads((folder / "preflight" / f"{job.number}.0" / "ranks.json").read_text())
    assert ranks["problems"] == []
    assert ranks["world_size"] == 2
    assert ranks["bandwidth_gb_s"] > 0
    kept = {path.name for path in (folder / "launches" / "0001").iterdir()}
    assert kept >= {"job.sbatch", "config.yaml", "environment.txt", "versions.json"}
    status = job.status()
    assert (status["state"], status["step"], status["restarts"], status["slow_ranks"]) == ("done", STEPS, 0, [])


def test_torchrun_on_every_node_is_what_starts_the_ranks(uninterrupted):
    text = (uninterrupted.run_dir / "job" / "launches" / "0001" / "job.sbatch").read_text()
    assert "#SBATCH --ntasks-per-node=1\n" in text
    (train,) = [line for line in text.splitlines() if "ling train" in line]
    assert shlex.split(train)[-5:-1] == ["${TORCHRUN[@]}", "-m", "ling", "train"]
    assert "--rdzv-backend=c10d" in text


def test_the_signal_before_the_limit_saves_requeues_and_resumes(submit, cluster, reference):
    job = submit()
    job.wait_for_step(3)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait("COMPLETED")
    first, second = job.attempts()
    assert first["reason"] == "stopped"
    assert "SIGUSR1" in first["ended"]
    assert 0 < second["resumed_from"] == first["last_step"] < STEPS
    assert [start["start"] for start in job.starts()] == [0, 1]
    assert job.losses() == reference
    status = job.status()
    assert (status["restarts"], status["replayed_steps"], status["first_failure"]) == (1, 0, None)


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_that_crashes_costs_no_more_than_the_steps_since_the_checkpoint(submit, cluster, reference, node):
    """n1 runs the job file, so that SLURM has to bring the job back; without n2 the job file does it."""
    job = submit()
    job.wait_for_step(SAVE_INTERVAL + 2)
    cluster.crash(node)
    job.wait("PENDING")
    cluster.start(node)
    job.wait("COMPLETED")
    first, second = job.attempts()
    assert second["reason"] == "done"
    if node == "n1":  # that of the rank that leads; the other one may have said what it saw of that
        assert first["reason"] == "killed" or "the rank or machine at the other end had gone" in first["ended"]
    else:
        assert first["ended"].startswith("rank 1 (n2) failed at step ")
        assert "its machine is gone or stands still" in first["ended"]
    assert job.starts()[0]["nodes"] == ["n1", "n2"]
    assert second["resumed_from"] in range(SAVE_INTERVAL, STEPS, SAVE_INTERVAL)
    assert job.losses() == reference


def test_a_node_that_fails_the_preflight_is_kept_off(submit, cluster, tmp_path, reference):
    run_dir = tmp_path / "runs" / tmp_path.name[:40]
    (run_dir / "job").mkdir(parents=True)
    cluster.make_read_only("n2", run_dir)
    try:
        job = submit()
        job.wait("COMPLETED")
    finally:
        cluster.undo_read_only("n2", run_dir)
    assert cluster.field(job.number, "ExcNodeList") == "n2"
    assert [start["nodes"] for start in job.starts()] == [["n1", "n2"], ["n1", "n3"]]
    assert "exclude: n2:" in job.output
    assert "runs/" in job.output.split("exclude: n2:")[1]
    assert job.losses() == reference


def test_a_cancelled_job_stays_so(submit, cluster):
    job = submit(*ENDLESS)
    job.wait_for_step(2)
    cluster.run("scancel", job.number)
    job.wait("CANCELLED")
    cluster.run("sleep", "10")  # longer than a requeued job waits
    assert [cluster.state(job.number), len(job.starts())] == ["CANCELLED", 1]
    (attempt,) = job.attempts()
    assert (attempt["reason"], "SIGTERM" in attempt["ended"]) == ("stopped", True)
    status = job.status()
    assert (status["state"], status["checkpoint_step"]) == ("stopped", attempt["last_step"])


def test_one_run_is_one_job(submit, cluster, tmp_path):
    first = submit(*ENDLESS, nodes=1)
    first.wait_for_step(2)
    again = submit(*ENDLESS, nodes=1)
    assert again.run_dir == first.run_dir
    assert cluster.state(again.number) == "PENDING"
    assert cluster.run("squeue", "-h", "-j", again.number, "-o", "%r").strip() == "Dependency"
    cluster.run("scancel", again.number)
    # under another name SLURM lets it start: then the lease on the folder holds
    path = first.run_dir / "job" / "launches" / "0002" / "job.sbatch"
    command = ["sbatch", "--parsable", "--job-name=another", str(path)]
    other = Job(cluster, cluster.run(*command, cwd=tmp_path).strip(), first.run_dir)
    other.wait("FAILED")
    assert "is in use by process" in other.output
    assert "stop: " in other.output
    assert cluster.state(first.number) == "RUNNING"
    before = max(first.losses())
    first.wait_for_step(before + 2)
    assert first.attempts() == []
    assert first.status()["state"] == "running"


def test_a_job_without_progress_gives_up(submit):
    fault = {"LING_TEST_FAULT": "1 3 raise", "PYTHONPATH": str(ROOT / "tests" / "e2e" / "faults")}
    job = submit("launch.max_failures=2", environment=fault)
    job.wait("FAILED")
    assert [start["step"] for start in job.starts()] == [0, 0]
    assert "again: rank 1 (n2) failed at step 3: ValueError: boom" in job.output
    reason = "2 starts in a row found no checkpoint and made no newer one: giving up"
    assert reason in job.output
    status = job.status()
    assert status["first_failure"].startswith("rank 1 (n2) failed at step 3: ValueError: boom")
    assert (status["state"], status["ended"], status["answer"]["word"]) == ("failed", {"failed": 2}, "stop")
    assert reason in status["answer"]["reason"]


def test_the_time_limit(limited):
    """Started before the other tests."""
    job = limited
    job.wait_until(lambda: len(job.attempts()) >= 1, "the end of the first attempt")
    attempt = job.attempts()[0]
    assert attempt["reason"] == "stopped"
    assert "SIGUSR1" in attempt["ended"]
    job.wait_for_step(attempt["last_step"] + 1)  # the job has brought itself back
    first, second = job.starts()[:2]
    assert (first["step"], second["step"]) == (0, attempt["last_step"])
