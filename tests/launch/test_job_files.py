"""The files in launch/, and what a job file says for a config, a cluster file and a launcher."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ling.cli import main
from ling.config import UserError, load_config
from ling.launch.job import expand_hosts, make_job
from ling.launch.render import fill, render

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*(ROOT / "launch").glob("*/*.sbatch"), *(ROOT / "launch").glob("*/*.sh")])
RUN = "configs/runs/tiny_dense.yaml"


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.chdir(ROOT)


def job_text(kind, *overrides, cluster="", nodes=None, tmp_path=None):
    path = None
    if tmp_path is not None:
        path = tmp_path / "cluster.yaml"
        path.write_text(f"name: mine\nnode: {{gpus: 1}}\n{cluster}")
    config = load_config(RUN, overrides)
    return render(make_job(kind, config, RUN, overrides, cluster_path=path and str(path), nodes=nodes))


def is_valid_bash(text):
    return subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_both_runs_are_there():
    names = {(path.parent.name, path.stem) for path in SHIPPED}
    assert names == {(kind, run) for kind in ("slurm", "torchrun") for run in ("ling_7_9b_powlu", "ling_124b_powlu")}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_files_are_what_the_templates_give(path, capsys):
    command = re.search(r"^# Made by: ling (.*)$", path.read_text(), re.MULTILINE)[1]
    assert main([*shlex.split(command), "--dry-run"]) == 0
    assert path.read_text() == capsys.readouterr().out
    assert is_valid_bash(path.read_text())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_files_hold_nothing_of_a_machine(path):
    assert not re.search(r"(?<![\w.$}\"])/(home|root|work|tmp|opt|mnt)\b", path.read_text())


def test_dry_run_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    argv = ["launch", "slurm", RUN, f"run.dir={folder}", "--cluster", "configs/clusters/h100.yaml", "--dry-run"]
    assert main([*argv, "train.micro_batch_size=1", "train.global_batch_size=8"]) == 0
    assert f"RUN={folder}\n" in capsys.readouterr().out
    assert not folder.exists()


def test_site_settings(tmp_path):
    cluster = """
slurm:
  partition: gpu
  account: me
  gpu_option: gres=gpu:h100:1
  options: {cpus-per-task: 96, reservation: night}
  time_limit: 2-00:00:00
setup: |
  module load cuda
  . venv/bin/activate
environment: {NCCL_IB_HCA: "mlx5_0,mlx5 1"}
"""
    text = job_text("slurm", "launch.time_limit=90m", cluster=cluster, nodes=2, tmp_path=tmp_path)
    options = re.findall(r"^#SBATCH --(\S+)", text, re.MULTILINE)
    assert {"partition=gpu", "account=me", "gres=gpu:h100:1", "cpus-per-task=96", "reservation=night"} <= set(options)
    assert {"nodes=2", "time=0-01:30:00", "signal=B:USR1@600", "requeue", "open-mode=append"} <= set(options)
    assert not any(option.startswith(("qos", "gpus-per-node", "array")) for option in options)
    assert "\nmodule load cuda\n. venv/bin/activate\nexport NCCL_IB_HCA='mlx5_0,mlx5 1'\n" in text
    assert "{{" not in text
    assert is_valid_bash(text)


def test_a_cpu_job_asks_for_no_gpus(tmp_path):
    text = job_text("slurm", "runtime.platform=cpu", tmp_path=tmp_path)
    assert "--gpus-per-node" not in text
    assert "--gpus 0" in text


def test_restart_variants(tmp_path):
    array = job_text("slurm", "launch.restart=array", "launch.array_size=4", tmp_path=tmp_path)
    assert "#SBATCH --array=1-4%1\n#SBATCH --no-requeue\n" in array
    assert "JOB=$SLURM_ARRAY_JOB_ID\nSTART=$SLURM_ARRAY_TASK_ID" in array
    assert "job/slurm-%A_%a.out" in array
    assert "scontrol requeue" not in array
    assert "singleton" not in array
    never = job_text("slurm", "launch.restart=never", tmp_path=tmp_path)
    assert "#SBATCH --no-requeue\n" in never
    assert "scontrol requeue" not in never
    assert is_valid_bash(array)
    assert is_valid_bash(never)


def test_containers(tmp_path):
    image = "launch.container=/images/ling.sqsh"
    pyxis = job_text("slurm", image, cluster="slurm: {container_mounts: '/data:/data'}", tmp_path=tmp_path)
    flags = '--container-image=/images/ling.sqsh --container-mounts="$PWD:$PWD,/data:/data"'
    assert pyxis.count(flags) == 2
    cluster = "slurm: {container_runtime: apptainer}"
    for kind, overrides in (("slurm", ()), ("local", ()), ("torchrun", ("launch.hosts=[a]",))):
        text = job_text(kind, image, *overrides, cluster=cluster, tmp_path=tmp_path)
        assert 'apptainer exec --nv --bind "$PWD" --pwd "$PWD" /images/ling.sqsh ' in text
        assert is_valid_bash(text)
    with pytest.raises(UserError, match=r"pyxis works under SLURM only; for local set slurm.container_runtime"):
        job_text("local", image, tmp_path=tmp_path)


def test_numa_binding(tmp_path):
    cluster = "environment: {}"
    assert "--numa-binding" not in job_text("slurm", cluster=cluster, tmp_path=tmp_path)
    (tmp_path / "cluster.yaml").write_text("node: {gpus: 1, numa_binding: node}")
    config = load_config(RUN)
    text = render(make_job("slurm", config, RUN, cluster_path=str(tmp_path / "cluster.yaml")))
    assert "--nproc-per-node=1 --numa-binding=node" in text


def test_expand_hosts():
    assert expand_hosts("node08..11") == ["node08", "node09", "node10", "node11"]
    assert expand_hosts("10.0.0.1") == ["10.0.0.1"]
    assert expand_hosts("user@a-1..2.site") == ["user@a-1.site", "user@a-2.site"]
    for wrong in ("a b", "x;reboot", "n3..1"):
        with pytest.raises(UserError, match=r"launch\.hosts"):
            expand_hosts(wrong)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("slurm", (), "no cluster file; give --cluster FILE, or set launch.cluster"),
        ("torchrun", (), r"no hosts; set launch.hosts=\[node1,node2\]"),
        ("torchrun", ("launch.hosts=[a,a]",), "a is named twice"),
        ("local", ("launch.nodes=2",), "runs on this machine alone"),
        ("local", ("launch.stop_before=soon",), "launch.stop_before: 'soon' is no length of time"),
        ("local", ("launch.time_limit=5m",), "launch.stop_before: 10m is no shorter than the job itself"),
        ("local", ("run.dir=a b",), "run.dir: 'a b' cannot stand in a job file"),
        ("local", ("launch.nproc_per_node=3",), "train.global_batch_size"),
    ],
)
def test_wrong_input(kind, overrides, message):
    with pytest.raises(UserError, match=message):
        job_text(kind, *overrides)


def test_wrong_names_in_a_cluster_file(tmp_path):
    for cluster, message in (
        ("slurm: {options: {bad option: x}}", "is no option of sbatch"),
        ("environment: {'A B': x}", "is no name of a variable"),
        ("slurm: {container_runtime: docker}", "not one of pyxis, apptainer"),
    ):
        with pytest.raises(UserError, match=message):
            job_text("slurm", cluster=cluster, tmp_path=tmp_path)


def test_fill():
    template = "a\n{{none}}\n    {{two}}\nx {{one}} y"
    assert fill(template, {"none": "", "two": "p\nq", "one": "1"}) == "a\n    p\n    q\nx 1 y\n"
