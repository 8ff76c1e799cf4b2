"""What a config builds: names, shapes and numbers of parameters, first weights, and megatron-core's own settings."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ling.config import UserError, load_config
from ling.config.schema import Config, ModelConfig, ParallelConfig
from ling.model.build import LingModel
from ling.model.counts import count_parameters, parameter_shapes
from ling.model.init import global_names
from tests.dist.training import DENSE, MOE, SyntheticStream, batch_of, build_single, tiny_config

pytestmark = pytest.mark.ranks(1)

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted([*(CONFIGS / "models").glob("*.yaml"), *(CONFIGS / "runs").glob("*.yaml")])
RUN = """
run: {name: built}
data: {train: none, tokenizer: none, sequence_length: 32}
optim: {lr: 1e-3}
train: {train_iters: 1, global_batch_size: 4}
parallel: {tensor_model_parallel_size: 1, pipeline_model_parallel_size: 1, expert_model_parallel_size: 1,
  expert_tensor_parallel_size: 1, sequence_parallel: false, virtual_pipeline_model_parallel_size: null}
"""
LARGEST_BUILT = 10_000_000  # parameters that a test allocates


def check_parameters(model: ModelConfig, chunk: LingModel) -> None:
    names = global_names(chunk)
    shapes = {names[name]: tuple(param.shape) for name, param in chunk.named_parameters()}
    assert shapes == parameter_shapes(model)
    assert sum(param.numel() for param in chunk.parameters()) == count_parameters(model).total


def shipped(path: Path, folder: Path) -> Config:
    """A shipped config as a run on one rank."""
    run = folder / "run.yaml"
    run.write_text(f"base: {path}\n{RUN}")
    config = load_config(run)
    config.parallel = ParallelConfig()
    return config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_build_with_the_counted_parameters(path, tmp_path):
    config = shipped(path, tmp_path)
    chunk = build_single(config, device="meta")
    assert {param.device.type for param in chunk.parameters()} == {"meta"}
    check_parameters(config.model, chunk)
    if count_parameters(config.model).total <= LARGEST_BUILT:
        check_parameters(config.model, build_single(config))


OPTIONS: dict[str, ModelConfig] = {
    "moe": MOE,
    "dense": DENSE,
    "no gate": replace(MOE, dense_activation="gelu", shared_activation="relu2", routed_activation="gelu"),
    "bare": replace(
        MOE, qk_layernorm=False, moe_shared_expert_intermediate_size=None, first_k_dense_replace=0, mtp_num_layers=0
    ),
    "full heads": replace(MOE, num_query_groups=None, kv_channels=None),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_build_with_the_counted_parameters(name):
    check_parameters(OPTIONS[name], build_single(tiny_config(model=OPTIONS[name])))


@pytest.mark.parametrize("output_init", ["plain", "scaled"])
def test_first_weights(output_init):
    model = replace(MOE, init_method_std=0.03, output_init=output_init)
    chunk = build_single(tiny_config(model=model))
    writes_to_residual = ("linear_proj.weight", "linear_fc2.weight", "experts.weight2")
    seen = set()
    for name, param in chunk.named_parameters():
        if param.dim() == 1:
            assert torch.equal(param, torch.ones_like(param)), name
            continue
        scaled = output_init == "scaled" and name.endswith(writes_to_residual)
        std = 0.03 / math.sqrt(2 * 4) if scaled else 0.03
        count = param.numel()
        assert float(param.double().std()) == pytest.approx(std, rel=4 / math.sqrt(2 * count)), name
        assert abs(float(param.double().mean())) < 4 * std / math.sqrt(count), name
        if name.endswith(writes_to_residual):
            seen.add(next(part for part in writes_to_residual if name.endswith(part)))
    assert len(seen) == 3


def test_first_weights_follow_the_seed():
    config = tiny_config()
    first, again, other = (
        {name: param.detach().clone() for name, param in build_single(config, seed=seed).named_parameters()}
        for seed in (None, config.run.seed, 77)
    )
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert weight.dim() == 1 or not torch.equal(weight, other[name])
    experts = first["decoder.layers.1.mlp.experts.weight1"]
    assert len({float(expert[0, 0]) for expert in experts}) == len(experts)


def test_first_weights_in_bf16_are_those_of_fp32_rounded():
    fp32 = dict(build_single(tiny_config()).named_parameters())
    for name, param in build_single(tiny_config(precision={"recipe": "bf16"})).named_parameters():
        assert torch.equal(param, fp32[name].bfloat16()), name


def test_the_vocabulary_is_padded():
    chunk = build_single(tiny_config(model=replace(MOE, vocab_size=250, make_vocab_size_divisible_by=64)))
    assert chunk.embedding.word_embeddings.weight.shape == (256, 64)
    batch = batch_of(SyntheticStream(250), 0, 2)
    logits = chunk(batch["tokens"], batch["position_ids"], None)
    assert logits.shape == (2, 32, 256)
    losses = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    torch.testing.assert_close(
        losses, torch.logsumexp(logits, -1) - logits.gather(-1, batch["labels"][..., None])[..., 0]
    )
    exact = build_single(tiny_config(model=replace(MOE, vocab_size=256, make_vocab_size_divisible_by=64)))
    assert exact.output_layer.weight.shape == (256, 64)


def test_fields_of_megatron_core():
    chunk = build_single(tiny_config(model=replace(MOE, mcore={"deterministic_mode": True})))
    assert chunk.config.deterministic_mode is True
    for mcore, complaint in (
        ({"no_such_field": 1}, "no_such_field: megatron-core's TransformerConfig has no such field"),
        ({"hidden_dropout": 0.1}, "hidden_dropout: ling sets this field itself"),
        ({"cpu_offloading": True, "cpu_offloading_num_layers": 9}, "megatron-core refuses this model: .*offloading"),
    ):
        config = tiny_config(model=replace(MOE, mcore=mcore))
        with pytest.raises(UserError, match=complaint):
            build_single(config)
