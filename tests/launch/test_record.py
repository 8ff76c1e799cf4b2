"""What is kept of a launch, and what is handed over."""

import json
import os
import secrets
import stat

import pytest

from ling.cli import main
from ling.config import load_config
from ling.launch.record import HIDDEN, environment

RUN = "configs/runs/tiny_dense.yaml"


@pytest.fixture
def launch(tmp_path, monkeypatch, request):
    """Runs `ling launch slurm` with a stand-in for sbatch."""
    monkeypatch.chdir(request.config.rootpath)
    (tmp_path / "cluster.yaml").write_text("node: {gpus: 1}")
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(
        '#!/bin/sh\n[ -z "$REFUSE" ] || { echo "sbatch: no $REFUSE" >&2; exit 1; }\n'
        f'echo "$*" >{tmp_path}/asked; echo "42;cluster"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    argv = ["launch", "slurm", RUN, f"run.dir={tmp_path}/run", "--cluster", str(tmp_path / "cluster.yaml")]
    return lambda *more: main([*argv, *more])


def test_secrets_are_not_kept():
    variables = {
        "WANDB_API_KEY": "abc",
        "HF_TOKEN": "abc",
        "aws_secret_access_key": "abc",
        "PGPASSWORD": "abc",
        "DB_PASS": "abc",
        "GIT_AUTH": "abc",
        "PROXY": "http://me:abc@proxy:80/",
        "NCCL_IB_HCA": "mlx5",
        "KEYBOARD": "us",
        "PATH": "/bin",
    }
    kept = environment(variables)
    assert not any("abc" in value for value in kept.values())
    assert kept["HF_TOKEN"] == HIDDEN
    assert {name: kept[name] for name in ("NCCL_IB_HCA", "KEYBOARD", "PATH")} == {
        "NCCL_IB_HCA": "mlx5",
        "KEYBOARD": "us",
        "PATH": "/bin",
    }
    assert kept["PROXY"] == "http://proxy:80/"


def test_what_is_kept(launch, tmp_path, monkeypatch, capsys):
    secret = secrets.token_hex()
    monkeypatch.setenv("MY_TOKEN", secret)
    assert launch("optim.lr=1e-3") == 0
    folder = tmp_path / "run" / "job" / "launches" / "0001"
    assert capsys.readouterr().out.startswith(f"job 42; its file is {folder}/job.sbatch, its output ")
    assert (tmp_path / "asked").read_text() == f"--parsable {folder}/job.sbatch\n"
    assert (folder / "job.sbatch").read_text().startswith("#!/bin/bash\n")
    assert (folder / "job.sbatch").stat().st_mode & stat.S_IXUSR
    assert load_config(folder / "config.yaml").optim.lr == 1e-3
    facts = json.loads((folder / "versions.json").read_text())
    assert facts["command"].startswith("ling launch slurm")
    assert "torch" in facts["versions"]
    assert secret not in "".join(path.read_text() for path in folder.iterdir())
    assert launch() == 0
    assert (folder.parent / "0002" / "job.sbatch").is_file()


def test_what_sbatch_refuses(launch, monkeypatch, capsys):
    monkeypatch.setenv("REFUSE", "partition")
    assert launch() == 1
    assert "ling: error: sbatch: sbatch: no partition; the job file is " in capsys.readouterr().err


def test_without_slurm(launch, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch() == 2
    assert "there is no sbatch on this machine; --dry-run prints the job file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_launch_does_not_keep_training_out(launch, tmp_path):
    from ling.commands.train import _check_folder

    assert launch() == 0
    _check_folder(tmp_path / "run", load_config(RUN))
