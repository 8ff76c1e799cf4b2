"""A real SLURM on this machine. Its tests run only where `-m` names them: they take minutes and root.

Of its five nodes three are for the tests, one job at a time; on the last two a job waits for its time limit meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ling.config.yaml_io import dump_yaml, parse_yaml
from tests.e2e.conftest import CONFIG
from tests.slurm.cluster import FINAL, Cluster, Job

STEPS, SAVE_INTERVAL = 20, 5
# Steps long enough to be interrupted: the loop itself, not the schedule of the tests, must decide what is lost.
SLOW_STEPS = """
import time
from ling.trainer import Trainer
step = Trainer.train_step
def slow(self, batches):
    time.sleep(0.25)
    return step(self, batches)
if Trainer.train_step.__name__ != "slow":
    Trainer.train_step = slow
"""
Submit = Callable[..., Job]


def pytest_collection_modifyitems(config, items):
    if "slurm" in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker("slurm")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster; the tests are skipped where SLURM cannot be run."""
    with tempfile.TemporaryDirectory(prefix="ling-slurm-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # munge wants all the folders above its socket open to everybody: not pytest's own
        cluster = Cluster(Path(folder))
        problem = cluster.up()
        if problem is not None:
            pytest.skip(problem)
        yield cluster
        cluster.down()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with a tokenizer, training data, and a plugin that makes steps slow enough to interrupt them."""
    from tests.e2e.cli import ling
    from tests.e2e.conftest import VOCAB_SIZE, write_corpus

    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "train.txt", 200, seed=0)
    files = ["--input", "train.txt", "--output"]
    for command in (
        ["tokenizer", "train", *files, "tokenizer", "--vocab-size", str(VOCAB_SIZE)],
        ["data", "prepare", *files, "train", "--tokenizer", "tokenizer", "--document-separator", ""],
    ):
        done = ling(*command, cwd=folder)
        assert done.code == 0, done
    return folder


def launch(
    cluster: Cluster,
    data: Path,
    folder: Path,
    *overrides: str,
    nodes: int = 2,
    partition: str = "main",
    environment: dict[str, str] | None = None,
    **settings: str,
) -> Job:
    """Submit a run of some nodes with one rank each, as `ling launch slurm` makes it.

    Args:
        partition: `main` has nodes n1 to n3, one more than a job needs, so that it can do without one; `aside` n4, n5.
        environment: what its processes see besides.
        settings: of the config's `launch`.
    """
    tree = parse_yaml(CONFIG, "")
    paths = {"train": str(data / "train"), "valid": None, "tokenizer": str(data / "tokenizer")}
    tree["run"] = {"name": folder.name[:40], "plugins": ["slow_steps.py"]}
    tree["data"] |= paths
    tree["train"] |= {"train_iters": STEPS, "eval_interval": 0}
    tree["checkpoint"] = {"save_interval": SAVE_INTERVAL}
    tree["observe"] = {"straggler_interval": SAVE_INTERVAL, "straggler_factor": 1000.0}
    tree["launch"] = {"time_limit": "20m", "stop_before": "1m"} | settings
    (folder / "run.yaml").write_text("# a test's\n" + dump_yaml(tree))
    (folder / "slow_steps.py").write_text(SLOW_STEPS)
    site = {"name": "test", "environment": {"GLOO_SOCKET_IFNAME": "eth0"}, "slurm": {"partition": partition}}
    (folder / "cluster.yaml").write_text("# a test's\n" + dump_yaml(site))
    command = ["python", "-m", "ling", "launch", "slurm", "run.yaml", *overrides, "--cluster", "cluster.yaml"]
    out = cluster.run(*command, "--nodes", str(nodes), cwd=folder, **(environment or {}))
    return Job(cluster, out.split()[1].rstrip(";"), folder / "runs" / tree["run"]["name"])


@pytest.fixture
def submit(cluster: Cluster, data: Path, tmp_path: Path) -> Iterator[Submit]:
    """`launch` in the test's folder; what is left of its jobs is cancelled."""
    jobs: list[Job] = []

    def submit(*overrides: str, **settings) -> Job:
        jobs.append(launch(cluster, data, tmp_path, *overrides, **settings))
        return jobs[-1]

    yield submit
    for job in jobs:
        if cluster.state(job.number) not in FINAL:
            cluster.run("scancel", job.number)
            job.wait(*FINAL)


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, data: Path, tmp_path_factory) -> Job:
    """A run that nothing has interrupted, when it is done."""
    job = launch(cluster, data, tmp_path_factory.mktemp("uninterrupted"))
    job.wait("COMPLETED")
    return job


@pytest.fixture(scope="session")
def reference(uninterrupted: Job) -> dict[int, float]:
    """Its losses."""
    return uninterrupted.losses()


@pytest.fixture(scope="session", autouse=True)
def early(request) -> None:
    """Whatever test asks for `limited`, it is submitted first."""
    if any("limited" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("limited")


@pytest.fixture(scope="session")
def limited(cluster: Cluster, data: Path, tmp_path_factory) -> Job:
    """A job that comes to its time limit while the other tests run."""
    endless = ("train.train_iters=10000", "checkpoint.save_interval=0")
    folder = tmp_path_factory.mktemp("limited")
    return launch(cluster, data, folder, *endless, partition="aside", time_limit="2m", stop_before="30s")
