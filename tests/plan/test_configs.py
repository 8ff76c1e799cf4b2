"""Shipped models, runs, ladder and clusters: totals, derived numbers, and that every run fits where it should."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

from ling.cli import main
from ling.config import check_config, load_config
from ling.config.report import diff
from ling.config.schema import ModelConfig
from ling.config.yaml_io import read_yaml
from ling.model.counts import count_parameters
from ling.plan.cluster import load_cluster
from ling.plan.plan import make_plan

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
WORLDS = (64, 128, 256, 512)
CLUSTERS = ("h800", "h100", "h200")
ACTIVATIONS = ("powlu", "swiglu", "swiglu_clip")
TOTALS = {
    "ling_7_9b": 7.9e9,
    "ling_124b": 124e9,
    "ling_mini_2": 16.26e9,
    "ling_flash_2": 102.89e9,
    "ling_1t": 999.7e9,
    "dense_7_9b": 7.9e9,
}
TOKENS = {"ling_7_9b": 600e9, "ling_124b": 800e9}

spec = importlib.util.spec_from_file_location("make_ladder", ROOT / "tools" / "make_ladder.py")
assert spec is not None
assert spec.loader is not None
make_ladder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_ladder)


def model_of(name: str) -> ModelConfig:
    return ModelConfig(**read_yaml(CONFIGS / "models" / f"{name}.yaml")["model"])


@pytest.mark.parametrize("name", TOTALS)
def test_total_parameters(name):
    assert count_parameters(model_of(name)).total_without_mtp == pytest.approx(TOTALS[name], rel=5e-3)


@pytest.mark.parametrize("name", ["ling_7_9b", "ling_124b"])
def test_derived_models_follow_the_family(name):
    model = model_of(name)
    assert model.num_attention_heads * 128 == model.hidden_size
    assert model.moe_ffn_hidden_size == model.moe_shared_expert_intermediate_size == model.hidden_size // 4
    mini = model_of("ling_mini_2")
    same = [f"moe_router_{key}" for key in ("topk", "num_groups", "group_topk", "topk_scaling_factor")]
    for key in [*same, "num_moe_experts", "kv_channels", "num_query_groups", "vocab_size", "first_k_dense_replace"]:
        assert getattr(model, key) == getattr(mini, key), key
    text = (CONFIGS / "models" / f"{name}.yaml").read_text()
    assert "not disclosed" in text
    assert text.count("derived:") >= 6


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_runs_differ_in_three_lines(name, activation):
    first = load_config(CONFIGS / "runs" / f"{name}_powlu.yaml")
    path = CONFIGS / "runs" / f"{name}_{activation}.yaml"
    run = load_config(path)
    assert run.model.activation["name"] == activation
    assert {key for key, _, _ in diff(first, run)} <= {"run.name", "model.activation"}
    if activation != "powlu":
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert len(lines) == 3


@pytest.mark.parametrize("name", TOKENS)
def test_schedule_of_a_run(name):
    run = load_config(CONFIGS / "runs" / f"{name}_powlu.yaml")
    per_step = run.train.global_batch_size * run.data.sequence_length
    assert 0 <= run.train.train_iters * per_step - TOKENS[name] < per_step
    rate, batch = make_ladder.hyperparameters(run.model, TOKENS[name])
    assert run.optim.lr == pytest.approx(rate, rel=0.02)
    assert run.train.global_batch_size == pytest.approx(batch, rel=0.02)
    assert run.optim.lr_wsd_decay_iters == pytest.approx(run.train.train_iters / 10, rel=0.01)


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_runs_fit_from_64_to_512_gpus(name, activation, cluster):
    run = load_config(CONFIGS / "runs" / f"{name}_{activation}.yaml")
    for world in WORLDS:
        plan = make_plan(run, load_cluster(CONFIGS / "clusters" / f"{cluster}.yaml"), world)
        assert plan.fits, (world, plan.over_gib)
        assert plan.notes == ()
        assert plan.reliability.goodput > 0.95
        assert plan.tokens == pytest.approx(TOKENS[name], rel=1e-4)


@pytest.mark.parametrize("name", [f"{model}_{activation}" for model in TOKENS for activation in ACTIVATIONS])
def test_placeholders_are_refused_in_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(CONFIGS / "runs" / f"{name}.yaml"), "--nproc", "64"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "PATH/TO/" in line
    assert list(tmp_path.iterdir()) == []


def test_the_ladder_is_what_the_tool_makes():
    made = {f"ladder_{size}m.yaml": make_ladder.render(size) for size in make_ladder.TARGETS}
    assert {path.name: path.read_text() for path in (CONFIGS / "ladder").iterdir()} == made


@pytest.mark.parametrize("millions", [26, 47, 92, 199, 368])
def test_a_rung_of_the_ladder(millions):
    run = load_config(CONFIGS / "ladder" / f"ladder_{millions}m.yaml")
    check_config(run, 8)
    assert run.run.name == f"ladder_{millions}m"
    assert make_ladder.activated(run.model) == pytest.approx(millions * 1e6, rel=0.03)
    assert 10 <= run.model.num_layers <= 24
    assert 512 <= run.model.hidden_size <= 1280
    tokens = run.train.train_iters * run.train.global_batch_size * run.data.sequence_length
    assert tokens == pytest.approx(634 * millions * 1e6, rel=1e-3)
    assert run.data.train == ["PATH/TO/TRAIN"]
    assert make_plan(run, load_cluster(CONFIGS / "clusters" / "h100.yaml"), 8).fits


def test_the_power_laws_pass_near_the_published_pairs():
    for sizes, rate, batch in make_ladder.PUBLISHED:
        found = make_ladder.hyperparameters(make_ladder.family(*sizes), make_ladder.PUBLISHED_TOKENS)
        assert found == (pytest.approx(rate, rel=0.02), pytest.approx(batch, rel=0.03))
    factor, exponent = make_ladder.power_law([(1.0, 3.0), (10.0, 300.0), (100.0, 30000.0)])
    assert (factor, exponent) == (pytest.approx(3), pytest.approx(2))


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters(name):
    cluster = load_cluster(CONFIGS / "clusters" / f"{name}.yaml")
    assert cluster.name == name
    assert cluster.node.gpus == 8
    assert math.isclose(cluster.gpu.peak_fp8_tflops, 2 * cluster.gpu.peak_bf16_tflops, rel_tol=1e-3)
    assert cluster.slurm.partition == "PARTITION"
