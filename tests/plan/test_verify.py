"""The ranks of made-up worlds: what is planned is what is built, and a wrong plan is found out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ling.config import Config, check_config, load_config
from ling.config.schema import RuntimeConfig
from ling.plan import verify as module
from ling.plan.activations import Storage, Tokens, chunk_bytes, layer_parts
from ling.plan.layout import make_layout, rank_kinds
from ling.plan.verify import Verification, verify
from tests.dist.training import DENSE, MOE, tiny_config

SELECTIVE = {"recompute_granularity": "selective"}
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "activation and norms": SELECTIVE | {"recompute_modules": ["activation", "layernorm"]},
    "experts": SELECTIVE | {"recompute_modules": ["moe"]},
    "attention": SELECTIVE | {"recompute_modules": ["core_attn"]},
    "dense and shared FFNs": SELECTIVE | {"recompute_modules": ["mlp", "shared_experts"]},
    "layers": {"recompute_granularity": "full"},
}


def built(config: Config, world: int) -> Verification:
    """The verification in this process, as the command does it."""
    from ling.platform import get_platform
    from ling.platform.select import choose

    runtime = RuntimeConfig(platform="cpu", backend="torch", attention="sdpa", kernels="reference")
    get_platform("cpu").start(0)
    operations = {name: choice.implementation for name, choice in choose(runtime, "cpu").items()}
    return verify(config, world, operations)


def large(recompute: dict[str, Any] | None = None, **parallel: Any) -> Config:
    """A model large enough that what is not counted is small: two dense layers, four with experts, MTP."""
    model = dataclasses.replace(
        MOE,
        num_layers=6,
        first_k_dense_replace=2,
        hidden_size=1024,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=128,
        ffn_hidden_size=3072,
        vocab_size=32000,
        moe_ffn_hidden_size=512,
        moe_shared_expert_intermediate_size=512,
        max_position_embeddings=2048,
        moe_aux_loss_coeff=0.0,
    )
    return tiny_config(
        16,
        model,
        data={"sequence_length": 2048},
        precision={"recipe": "bf16"},
        train={"micro_batch_size": 2, "global_batch_size": 32},
        runtime=recompute or {},
        parallel=parallel,
    )


@pytest.mark.parametrize("name", RECOMPUTE)
def test_saved_activations(name):
    result = built(large(RECOMPUTE[name]), 16)
    assert result.problems == []
    (rank,) = result.ranks
    assert rank.expected_activations == pytest.approx(rank.activations, rel=0.03)


@pytest.mark.parametrize(
    "parallel",
    [
        SP2,
        SP2 | {"expert_model_parallel_size": 4},
        SP2 | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 8},
        {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2, **SP2},
    ],
    ids=["TP", "TP and EP", "ETP", "PP and EP", "VPP"],
)
def test_layouts(parallel, monkeypatch):
    config = large()
    config.runtime.platform = "cuda"  # ETP is for GPUs, and so is the plan
    config.parallel = dataclasses.replace(config.parallel, **parallel)
    world = 24 if config.parallel.pipeline_model_parallel_size == 3 else 16
    config.train.global_batch_size = 48 if world == 24 else 32
    check_config(config, world)
    result = built(config, world)
    assert result.problems == []
    assert len(result.ranks) == config.parallel.pipeline_model_parallel_size
    for rank in result.ranks:
        assert rank.parameters == rank.expected_parameters > 0
        assert rank.expected_activations == pytest.approx(rank.activations, rel=0.06)


def test_kinds_of_ranks_cover_the_world():
    config = large(pipeline_model_parallel_size=2, expert_model_parallel_size=4)
    kinds = list(rank_kinds(config, make_layout(config, 16)))
    assert [rank for kind in kinds for rank in kind.ranks] == list(range(16))
    assert [chunk.layers for kind in kinds for chunk in kind.stage.chunks] == [(0, 1, 2), (3, 4, 5)]
    assert [kind.stage.chunks[0].embedding for kind in kinds] == [True, True]  # the MTP layer brings a copy
    assert [kind.stage.chunks[0].head for kind in kinds] == [False, True]


def test_a_wrong_plan_is_found_out(monkeypatch):
    config = large(pipeline_model_parallel_size=2)
    wrong = dataclasses.replace(
        config, model=dataclasses.replace(config.model, ffn_hidden_size=3584, qk_layernorm=False)
    )

    def kinds_of_another_model(given, layout):
        return rank_kinds(wrong, layout)

    monkeypatch.setattr(module, "rank_kinds", kinds_of_another_model)
    problems = built(config, 16).problems
    assert any("rank 0: decoder.layers.0.mlp.linear_fc1.weight: built as (6144, 1024)" in line for line in problems)
    assert any("rank 8: decoder.layers.4.self_attention.q_layernorm.weight: not planned" in line for line in problems)


def test_dense_model_and_fp32():
    config = dataclasses.replace(large(), precision=dataclasses.replace(large().precision, recipe="fp32"))
    model = dataclasses.replace(DENSE, num_layers=2, hidden_size=1024, kv_channels=128, num_attention_heads=8,
                                num_query_groups=4, ffn_hidden_size=3072, max_position_embeddings=2048)  # fmt: skip
    (rank,) = built(dataclasses.replace(config, model=model), 16).ranks
    assert rank.problems == []
    assert rank.expected_activations == pytest.approx(rank.activations, rel=0.03)


def test_parts_of_a_layer_by_hand():
    config = large()
    layout = make_layout(config, 16)
    tokens, storage = Tokens.of(config, layout), Storage.of(config)
    parts = layer_parts(config, layout, tokens, storage, moe=True)
    count, rows = 2 * 2048, 2 * 2048 * 2
    assert (tokens.outside, tokens.inside, tokens.rows) == (count, count, rows)
    assert parts["residual"] == 2 * count * 1024 * 2
    assert parts["routed_fc1"] == rows * 2 * 512 * 2
    assert parts["shared_activation"] == count * 512 * 2
    assert chunk_bytes(config, layout, tokens, storage, layout.stages[0].chunks[0])[0] > 4 * sum(parts.values())


@pytest.mark.parametrize("name", ["ling_7_9b_powlu", "ling_124b_powlu"])
def test_the_shipped_runs(name):
    config = load_config(f"configs/runs/{name}.yaml")
    result = built(config, 512)
    assert result.problems == []
    assert len(result.ranks) == config.parallel.pipeline_model_parallel_size
    for rank in result.ranks:
        assert rank.expected_activations == pytest.approx(rank.activations, rel=0.03)
