"""The rendered job file under a real SLURM: two nodes, interruptions of every kind, and the same losses after them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ling.config.yaml_io import dump_yaml, parse_yaml
from tests.e2e.conftest import CONFIG
from tests.slurm.cluster import ROOT, Cluster, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]
STEPS, SAVE_INTERVAL = 24, 8
# Steps long enough to be interrupted: the loop itself, not the schedule of the tests, must decide what is lost.
SLOW_STEPS = """
import time
from ling.trainer import Trainer
step = Trainer.train_step
def slow(self, batches):
    time.sleep(0.3)
    return step(self, batches)
if Trainer.train_step.__name__ != "slow":
    Trainer.train_step = slow
"""
Submit = Callable[..., Job]


@pytest.fixture
def submit(cluster: Cluster, data: Path, tmp_path: Path) -> Iterator[Submit]:
    """Submits a run of two nodes with one rank each, as `ling launch slurm` makes it; cancels what is left."""
    jobs: list[Job] = []

    def submit(nodes: int = 2, *overrides: str, environment: dict[str, str] | None = None, **settings: str) -> Job:
        tree = parse_yaml(CONFIG, "")
        paths = {"train": str(data / "train"), "valid": None, "tokenizer": str(data / "tokenizer")}
        tree["run"] = {"name": tmp_path.name[:40], "plugins": ["slow_steps.py"]}
        tree["data"] |= paths
        tree["train"] |= {"train_iters": STEPS, "eval_interval": 0}
        tree["checkpoint"] = {"save_interval": SAVE_INTERVAL}
        tree["launch"] = {"time_limit": "20m", "stop_before": "1m"} | settings
        (tmp_path / "run.yaml").write_text("# a test's\n" + dump_yaml(tree))
        (tmp_path / "slow_steps.py").write_text(SLOW_STEPS)
        (tmp_path / "cluster.yaml").write_text("# a test's\nname: test\nenvironment: {GLOO_SOCKET_IFNAME: eth0}\n")
        command = ["python", "-m", "ling", "launch", "slurm", "run.yaml", *overrides, "--cluster", "cluster.yaml"]
        out = cluster.run(*command, "--nodes", str(nodes), cwd=tmp_path, **(environment or {}))
        number = out.split()[1].rstrip(";")
        jobs.append(Job(cluster, number, tmp_path / "runs" / tree["run"]["name"]))
        return jobs[-1]

    yield submit
    for job in jobs:
        if cluster.state(job.number) in ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED"):
            cluster.run("scancel", job.number)
            job.wait("CANCELLED", "COMPLETED", "FAILED")


@pytest.fixture(scope="session")
def reference() -> dict[int, float]:
    """The losses of the uninterrupted run, filled in by the first test."""
    return {}


def test_two_nodes_train_without_interruption(submit, reference):
    job = submit()
    job.wait("COMPLETED")
    reference |= job.losses()
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


def test_the_signal_before_the_limit_saves_requeues_and_resumes(submit, cluster, reference):
    job = submit()
    job.wait_for_step(4)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait("COMPLETED")
    first, second = job.attempts()
    assert first["reason"] == "stopped"
    assert "SIGUSR1" in first["ended"]
    assert 0 < second["resumed_from"] == first["last_step"] < STEPS
    assert [start["start"] for start in job.starts()] == [0, 1]
    assert job.losses() == reference


def test_a_node_that_crashes_costs_no_more_than_the_steps_since_the_checkpoint(submit, cluster, reference):
    job = submit()
    job.wait_for_step(SAVE_INTERVAL + 2)
    lost = cluster.field(job.number, "NodeList")
    assert lost == "n[1-2]"
    cluster.crash("n2")
    job.wait("PENDING")
    cluster.start("n2")
    job.wait("COMPLETED")
    first, second = job.attempts()
    assert second["resumed_from"] >= SAVE_INTERVAL
    assert (first["reason"], second["reason"]) != ("done", "done")
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
    job = submit()
    job.wait_for_step(2)
    cluster.run("scancel", job.number)
    job.wait("CANCELLED")
    state = [cluster.state(job.number), len(job.starts())]
    cluster.run("sleep", "12")  # longer than a requeued job waits
    assert [cluster.state(job.number), len(job.starts())] == state == ["CANCELLED", 1]
    (attempt,) = job.attempts() or [{"reason": "killed"}]
    assert attempt["reason"] in ("stopped", "killed")


def test_one_run_is_one_job(submit, cluster, tmp_path):
    first = submit(nodes=1)
    first.wait_for_step(2)
    again = submit(nodes=1)
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
    first.wait("COMPLETED")
    assert [attempt["reason"] for attempt in first.attempts()] == ["done"]


def test_a_job_without_progress_gives_up(submit, cluster):
    fault = {"LING_TEST_FAULT": "1 3 raise", "PYTHONPATH": str(ROOT / "tests" / "e2e" / "faults")}
    job = submit(2, "launch.max_failures=2", environment=fault)
    job.wait("FAILED")
    assert [start["step"] for start in job.starts()] == [0, 0]
    assert "again: rank 1 (n2) failed at step 3: ValueError: boom" in job.output
    assert "2 starts in a row found no checkpoint and made no newer one: giving up" in job.output
    status = json.loads(cluster.run("python", "-m", "ling", "status", str(job.run_dir), "--json"))
    assert status["first_failure"].startswith("rank 1 (n2) failed at step 3: ValueError: boom")
    assert status["ended"] == {"failed": 2}


def test_the_time_limit(submit):
    job = submit(2, "train.train_iters=10000", "checkpoint.save_interval=0", time_limit="2m", stop_before="30s")
    job.wait_until(lambda: len(job.attempts()) == 1, "the end of the first attempt")
    (attempt,) = job.attempts()
    assert attempt["reason"] == "stopped"
    assert "SIGUSR1" in attempt["ended"]
    job.wait_for_step(attempt["last_step"] + 1)  # the job has brought itself back
    assert [start["step"] for start in job.starts()] == [0, attempt["last_step"]]
