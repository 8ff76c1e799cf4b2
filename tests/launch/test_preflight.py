"""The checks before a start: of a node by itself, and of all ranks together."""

import json
import os
import threading

import pytest
import torch

from ling.cli import main
from ling.launch import node_checks, rank_checks
from ling.launch.node_checks import check_node, gpu_problems, parse_gpus
from ling.launch.rank_checks import check_memory, check_products, summarize, unanswered
from ling.launch.reports import problems_of

SMI = """0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, 0
1, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 40960, 0
2, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, 2
3, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, [N/A]
"""
CPU = torch.device("cpu")


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "starts.jsonl").write_text("{}\n")
    return tmp_path


def fake_smi(folder, monkeypatch, script):
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_cpu_node(run_dir):
    report = check_node(run_dir, gpus=0)
    assert report["problems"] == []
    assert report["gpus"] == []
    assert abs(report["clock_s"]) < 5
    assert {"python", "ling", "torch"} <= set(report["versions"])
    assert [path.name for path in (run_dir / "job").iterdir()] == ["starts.jsonl"]  # nothing is left behind


def test_gpus():
    assert gpu_problems(parse_gpus(SMI), 8) == [
        "4 of 8 GPUs are there",
        "GPU 1 is not idle: 40.0 GiB are in use",
        "GPU 2 has 2 uncorrected memory errors",
    ]
    assert gpu_problems(parse_gpus(SMI.splitlines()[0]), 1) == []


def test_a_gpu_node(tmp_path, monkeypatch):
    fake_smi(tmp_path, monkeypatch, f"cat <<'END'\n{SMI.splitlines()[0]}\nEND")
    report = check_node(None, gpus=1)
    assert report["problems"] == []
    assert report["versions"]["driver"] == "570.86.15"
    fake_smi(tmp_path, monkeypatch, "echo No devices were found; exit 6")
    assert check_node(None, gpus=1)["problems"] == ["nvidia-smi failed: No devices were found"]


def test_no_driver_and_a_driver_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_node(None, gpus=8)["problems"] == ["no nvidia-smi, where 8 GPUs should be"]
    assert check_node(None, gpus=None)["problems"] == []
    monkeypatch.setattr(node_checks, "_TIMEOUT_S", 0.2)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nread forever </dev/zero\nexec /bin/sleep 60\n")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert check_node(None, gpus=8)["problems"] == ["nvidia-smi gave no answer in 0.2 s"]


def test_space_and_a_folder_that_cannot_be_written(run_dir, tmp_path):
    (problem,) = check_node(run_dir, gpus=0, free_gb=1e9)["problems"]
    assert problem.startswith(f"{run_dir} has ")
    assert problem.endswith("GB left, 1e+09 GB are needed")
    (tmp_path / "file").write_text("")
    (problem,) = check_node(tmp_path / "file", gpus=0)["problems"]
    assert problem == f"{tmp_path / 'file'} cannot be written: Not a directory"


def test_the_command(run_dir, capsys):
    argv = ["preflight", "--run-dir", str(run_dir), "--gpus", "0"]
    assert main([*argv, "--job", "7.0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert problems_of(run_dir, "7.0", [report["node"]]).reasons == ()
    assert problems_of(run_dir, "7.0", [report["node"], "n9"]).nodes == ("n9",)
    assert main([*argv, "--free-gb", "1e9"]) == 1
    assert f"ling: error: preflight: {report['node']}: {run_dir} has" in capsys.readouterr().out
    assert problems_of(run_dir, "8.0", ["n1"]) is None
    (run_dir / "job" / "starts.jsonl").unlink()
    assert main([*argv, "--job", "7.1"]) == 1
    assert "is not the folder that the other nodes see" in capsys.readouterr().out
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)  # one that is left would end this process


def test_products_and_memory_of_a_sound_machine():
    assert check_products(CPU) > 0
    assert check_memory(CPU) > 0


def test_a_wrong_product_is_found(monkeypatch):
    right = torch.Tensor.__matmul__

    def wrong(a, b):
        product = right(a, b)
        if a.dtype == torch.float32:
            product[3, 4] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    with pytest.raises(ArithmeticError, match="a matrix product is wrong"):
        check_products(CPU)


def test_memory_that_forgets_is_found(monkeypatch):
    right = torch.Tensor.copy_

    def forgetful(self, source):
        right(self, source)
        self.view(-1)[12345] ^= 64
        return self

    monkeypatch.setattr(torch.Tensor, "copy_", forgetful)
    with pytest.raises(ArithmeticError, match="block 0 of 2 does not hold what was written"):
        check_memory(CPU)


@pytest.mark.ranks(2)
def test_all_reduce():
    from ling.parallel.groups import World

    world = World.from_environment()
    assert rank_checks.check_all_reduce(CPU, World(torch.distributed.get_rank(), 2, world.local_rank, 2)) > 0


def result(rank, node, **values):
    return {"rank": rank, "node": node, "problems": [], "versions": {"nccl": "2.27"}, "device": "cuda", **values}


def test_slow_and_different_ranks_are_named():
    results = [result(rank, f"n{rank // 2}", tflops=600.0, bandwidth_gb_s=300.0 + rank) for rank in range(6)]
    assert summarize(results)["problems"] == []
    assert summarize(results)["bandwidth_gb_s"] == 300.0
    results[3]["tflops"] = 200.0
    results[4]["versions"] = results[5]["versions"] = {"nccl": "2.19"}
    results[0]["problems"].append("rank 0: RuntimeError: x")
    assert summarize(results)["problems"] == [
        ["n0", "rank 0: RuntimeError: x"],
        ["n2", "nccl is 2.19, elsewhere 2.27"],
        ["n1", "rank 3: 200 TFLOP/s, others 600"],
    ]


def test_who_keeps_the_others_waiting():
    stages = {0: ["all-reduce", "n1"], 1: ["memory", "n1"], 2: ["all-reduce", "n2"]}
    assert unanswered(stages, 3) == [["n1", "rank 1 stood at memory after 180 s"]]
    assert unanswered({0: ["memory", "n1"]}, 2) == [["", "ranks 1 gave no answer in 180 s"]]
    assert unanswered({0: ["memory", "n1"], 1: ["memory", "n2"]}, 2)[0][0] == ""


@pytest.mark.slow
def test_under_torchrun(run_dir, tmp_path):
    from tests.launch.torchrun import torchrun

    argv = ["-m", "ling", "preflight", "--run-dir", str(run_dir), "--job", "7.0"]
    done = torchrun(2, *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "preflight: 2 ranks are fit" in done.stdout
    report = json.loads((run_dir / "job" / "preflight" / "7.0" / "ranks.json").read_text())
    assert (report["problems"], report["world_size"]) == ([], 2)
