"""A real SLURM of three nodes on this machine. Its tests run only where `-m` names them: they take minutes and root."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster


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
        cluster = Cluster(Path(folder) / "cluster", nodes=3)
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
