"""The plan as a person meets it: the command, its exit codes and messages, the search, and what the numbers mean."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ling.cli import main
from ling.config import load_config
from ling.config.derived import global_batch_size_at
from ling.plan.cluster import Cluster, Gpu, load_cluster
from ling.plan.plan import make_plan, mends
from ling.plan.reliability import goodput
from ling.plan.search import search
from ling.plan.text import columns, duration

ROOT = Path(__file__).parents[2]
RUN = str(ROOT / "configs" / "runs" / "ling_7_9b_powlu.yaml")
LARGE_RUN = str(ROOT / "configs" / "runs" / "ling_124b_powlu.yaml")
TINY = str(ROOT / "configs" / "runs" / "tiny_moe.yaml")
H800 = str(ROOT / "configs" / "clusters" / "h800.yaml")


def test_a_plan_that_fits(capsys):
    assert main(["plan", LARGE_RUN, "--world", "512", "--cluster", H800]) == 0
    out = capsys.readouterr().out
    assert "512 x H800 (h800): TP 1, PP 8, EP 8, expert DP 8, DP 64" in out
    assert out.count("2 + embedding + MTP + head") == 1
    for word in (
        "fits: ",
        "Time of a step: ",
        "limited by: ",
        "800B tokens",
        "GPU-hours",
        "Young/Daly",
        "a activations",
    ):
        assert word in out


def test_a_plan_that_does_not_fit(capsys):
    assert main(["plan", RUN, "--world", "8", "train.micro_batch_size=8"]) == 1
    out = capsys.readouterr().out
    assert "does NOT fit: " in out
    assert "the largest part is activations" in out
    assert "  train.micro_batch_size=4: " in out


def test_what_would_help_does(capsys):
    config = load_config(RUN, ["train.micro_batch_size=8", "parallel.expert_model_parallel_size=4"])
    plan = make_plan(config, Cluster(), 64)
    assert not plan.fits
    lines = mends(plan)
    assert any(line.startswith("parallel.expert_model_parallel_size=8: ") for line in lines)
    settings, _, claim = next(line for line in lines if ": fits with" in line).partition(": ")
    other = make_plan(
        load_config(RUN, ["train.micro_batch_size=8", "parallel.expert_model_parallel_size=4", *settings.split()]),
        Cluster(),
        64,
    )
    assert other.fits
    assert claim.startswith(f"fits with {-other.over_gib:.1f} GiB to spare")


def test_json(capsys):
    assert main(["plan", RUN, "--world", "64", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    assert plan["layout"] == {"tp": 1, "pp": 1, "vpp": 1, "ep": 8, "etp": 1, "dp": 64, "edp": 8}
    (stage,) = plan["stages"]
    memory = stage["memory"]
    parts = ("weights", "gradients", "optimizer", "activations", "transient")
    assert memory["allocated"] == pytest.approx(sum(memory[part] for part in parts))
    assert plan["needed_gib"] == pytest.approx(memory["needed"] / 2**30)
    step = plan["step"]
    assert step["total"] == pytest.approx(
        sum(step[part] for part in ("compute", "bubble", "pipeline", "data", "optimizer"))
    )
    assert step["compute"] == pytest.approx(sum(step["kinds"].values()))
    assert plan["tokens_per_s"] * step["total"] == pytest.approx(1024 * 4096)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([RUN, "--world", "4"], "needs at least 8 ranks, got 4: plan with --world 8"),
        ([RUN, "--world", "96"], "train.global_batch_size: 1024 is not a multiple of micro_batch_size (2) x"),
        ([RUN, "parallel.expert_model_parallel_size=3"], "model.num_moe_experts: 256 is not a multiple of"),
        ([RUN, "parallel.pipeline_model_parallel_size=2"], "17 layers do not divide into 2 pipeline stages"),
        ([RUN, "--cluster", "none.yaml"], "none.yaml: no such config file (named by --cluster); check the path"),
        ([RUN, "--imbalance", "0.5"], "expected a number of at least 1, got '0.5'"),
        ([RUN, "--search", "--verify"], "--search and --verify: give one of them"),
        (["none.yaml"], "none.yaml: no such config file"),
        ([RUN, "model.num_layer=3"], "unknown key model.num_layer; did you mean model.num_layers?"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line
    assert captured.out == ""


def test_what_training_would_refuse_is_a_note(capsys):
    assert main(["plan", RUN, "--world", "8", "precision.recipe=fp8_emulated"]) == 0
    assert "note      `ling train` would refuse this: precision.recipe: fp8_emulated" in capsys.readouterr().out


def test_planning_needs_no_torch():
    program = (
        "import sys\nfrom ling.cli import main\n"
        f"codes = [main(['plan', {RUN!r}, '--world', '64', *more]) for more in ([], ['--json'])]\n"
        "sys.exit(any(codes) or 'torch' in sys.modules or 'megatron' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_the_search_ranks_layouts_that_fit_and_says_how(capsys):
    config = load_config(RUN)
    small = dataclasses.replace(load_cluster(H800), gpu=Gpu(memory_gib=40.0))
    found = search(config, small, 16)
    times = [row.plan.step.total for row in found]
    assert len(found) > 20
    assert times == sorted(times)
    assert all(row.plan.fits and row.plan.layout.world == 16 for row in found)
    for row in (found[0], found[-1]):
        again = make_plan(load_config(RUN, row.settings), small, 16)
        assert again.step == row.plan.step
        assert again.memory == row.plan.memory
    assert main(["plan", RUN, "--world", "16", "--search", "--cluster", H800, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 10
    assert rows[0]["step"]["total"] <= rows[1]["step"]["total"]


def test_a_search_that_finds_nothing(capsys, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("gpu: {memory_gib: 4}\n")
    assert main(["plan", RUN, "--world", "8", "--search", "--cluster", str(path)]) == 1
    assert "no layout of 8 ranks fits 4 GiB: try more ranks, or larger GPUs" in capsys.readouterr().out


def test_the_verification_as_a_command(capsys):
    assert main(["plan", TINY, "--world", "2", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "built 1 rank, all that are distinct of 2" in out
    assert "routing is assumed uniform" in out
    assert "every parameter has the planned name and shape" in out
    assert main(["plan", LARGE_RUN, "--world", "1024", "--verify", "--json", "train.global_batch_size=2816"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["built"]) == 8
    assert [row["problems"] for row in result["built"]] == [[]] * 8
    assert result["built"][-1]["ranks"] == [896, 1023]


def test_more_of_anything_is_never_free():
    """Directions that any model of time and memory must have."""
    base = make_plan(load_config(LARGE_RUN), Cluster(), 128)
    none = ["runtime.recompute_granularity=none", "runtime.recompute_modules=[]"]
    full = ["runtime.recompute_granularity=full", "runtime.recompute_modules=[]"]
    without, everything = (make_plan(load_config(LARGE_RUN, more), Cluster(), 128) for more in (none, full))
    assert everything.step.total > base.step.total > without.step.total
    assert everything.memory[0].activations < base.memory[0].activations < without.memory[0].activations
    worse = make_plan(load_config(LARGE_RUN), Cluster(), 128, imbalance=1.5)
    assert worse.step.total > base.step.total
    assert worse.memory[0].activations > base.memory[0].activations
    fewer = make_plan(load_config(LARGE_RUN, ["train.global_batch_size=704"]), Cluster(), 128)
    assert fewer.step.bubble / fewer.step.total > base.step.bubble / base.step.total
    more = make_plan(load_config(LARGE_RUN), Cluster(), 256)
    assert more.step.total < base.step.total
    assert more.memory[0].optimizer < base.memory[0].optimizer
    assert base.mfu < 1


def test_fp8_keeps_more_weights_and_smaller_inputs():
    bf16, fp8 = (
        make_plan(load_config(LARGE_RUN, [f"precision.recipe={name}"]), Cluster(), 128) for name in ("bf16", "fp8")
    )
    assert fp8.memory[1].weights == pytest.approx(2 * bf16.memory[1].weights, rel=0.01)
    assert fp8.memory[1].activations < bf16.memory[1].activations
    assert fp8.step.kinds.grouped < bf16.step.kinds.grouped


def test_a_growing_batch_is_counted_step_by_step(capsys):
    constant = ["optim.lr_decay_style=constant", "optim.lr_wsd_decay_iters=null", "optim.lr_warmup_iters=0"]
    overrides = [*constant, "train.train_iters=30", "train.global_batch_size=3072"]
    ramp = "train.rampup_batch_size=[768,768,20000]"
    config = load_config(LARGE_RUN, [*overrides, ramp])
    plan = make_plan(config, load_cluster(H800), 512)
    useful = consumed = 0
    for _ in range(30):
        batch = global_batch_size_at(config, consumed)
        fixed = load_config(LARGE_RUN, [f"train.global_batch_size={batch}"])
        useful += make_plan(fixed, load_cluster(H800), 512).step.total
        consumed += batch
    assert {global_batch_size_at(config, at) for at in range(0, consumed, 768)} == {768, 1536, 2304, 3072}
    assert plan.tokens == consumed * config.data.sequence_length
    assert plan.useful_s == pytest.approx(useful)
    assert plan.run_s == pytest.approx(useful / plan.reliability.goodput)
    assert plan.useful_s < 0.9 * 30 * plan.step.total
    assert main(["plan", LARGE_RUN, "--world", "512", "--cluster", H800, *overrides, ramp]) == 0
    assert "; from 768 sequences by 768 over the first 20k\n" in capsys.readouterr().out
    assert main(["plan", LARGE_RUN, "--world", "512", *overrides, "train.rampup_batch_size=[100,743,9]"]) == 2
    assert "train.rampup_batch_size: start 100 is not a multiple of" in capsys.readouterr().err


def simulate(interval: float, save: float, mtbf: float, restart: float, useful: float, draw: random.Random) -> float:
    """Wall time of so much training, event by event."""
    wall = done = 0.0
    failure = draw.expovariate(1 / mtbf)
    while done < useful:
        if wall + interval + save < failure:
            wall, done = wall + interval + save, done + interval
        else:
            wall = failure + restart
            failure = wall + draw.expovariate(1 / mtbf)
    return wall


@pytest.mark.parametrize(("interval", "save", "mtbf"), [(1800, 30, 40 * 3600), (600, 60, 20 * 3600), (7200, 120, 1e5)])
def test_goodput_against_a_simulation(interval, save, mtbf):
    useful = 3e7
    wall = simulate(interval, save, mtbf, 600, useful, random.Random(0))
    assert goodput(interval, save, mtbf, 600) == pytest.approx(useful / wall, rel=0.01)


def test_young_and_dalys_interval_is_the_best():
    plan = make_plan(load_config(LARGE_RUN), load_cluster(H800), 512)
    held = plan.reliability
    assert held.best_interval_s == pytest.approx(math.sqrt(2 * held.save_s * held.mtbf_s))
    assert held.save_s == pytest.approx(held.checkpoint_bytes / 20e9)
    assert held.checkpoint_bytes == plan.counts.total * 14  # bf16 weights; fp32 weights and two moments
    best = goodput(held.best_interval_s, held.save_s, held.mtbf_s, 600)
    for factor in (0.5, 0.8, 1.25, 2):
        assert goodput(factor * held.best_interval_s, held.save_s, held.mtbf_s, 600) < best + 1e-4


def test_texts():
    shown = [duration(value) for value in (0.0123, 7, 100, 600, 10000, 2e6, math.inf)]
    assert shown == ["12.3 ms", "7 s", "100 s", "10 min", "2.78 h", "23.1 days", "for ever"]
    assert columns([("a", "bb"), ("cc", "d")]) == ["a   bb", "cc   d"]
