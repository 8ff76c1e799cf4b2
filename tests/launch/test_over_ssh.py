"""The job file of `ling launch torchrun` with real training: two hosts that are this machine, ssh a stand-in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ling.cli import main
from ling.config.yaml_io import dump_yaml, parse_yaml
from tests.e2e.conftest import CONFIG, place  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_two_hosts(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    tree = parse_yaml(CONFIG, "")
    tree["data"] |= {"train": str(place / "train"), "valid": None, "tokenizer": str(place / "tokenizer")}
    tree["launch"] = {"hosts": ["localhost", "127.0.0.1"]}
    (tmp_path / "run.yaml").write_text("# a test's\n" + dump_yaml(tree))
    (tmp_path / "ssh").write_text('#!/bin/bash\nexec bash -c "${@: -1}"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "torchrun", "run.yaml", "--dry-run"]) == 0
    (tmp_path / "job.sh").write_text(capsys.readouterr().out)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "job.sh"], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "localhost: preflight: 2 ranks are fit" in done.stdout
    assert done.stdout.endswith("done: was done at step 6\n")
    (attempt,) = (json.loads(line) for line in (tmp_path / "runs/tiny/job/attempts.jsonl").read_text().splitlines())
    assert (attempt["nodes"], attempt["world_size"]) == (2, 2)
