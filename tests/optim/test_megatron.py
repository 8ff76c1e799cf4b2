"""What our AdamW replaces in megatron-core, and which parameters decay."""

import importlib

import pytest
import torch

from ling.config.schema import OptimConfig
from ling.optim import megatron
from ling.optim.adamw import AdamW
from ling.optim.megatron import _REPLACED, has_no_weight_decay, set_hyperparameters, use_our_adam


@pytest.fixture
def untouched(monkeypatch):
    """megatron-core as it is where it found neither Transformer Engine nor Apex, put back afterwards."""
    stock = {"Adam": torch.optim.AdamW, "USING_PYTORCH_OPTIMIZER": True}
    for module, name, _ in _REPLACED:
        monkeypatch.setattr(importlib.import_module(module), name, stock.get(name, False))


def values():
    return [getattr(importlib.import_module(module), name) for module, name, _ in _REPLACED]


@pytest.mark.usefixtures("untouched")
def test_every_replaced_name_exists_and_is_replaced_once():
    use_our_adam()
    assert values() == [value for _, _, value in _REPLACED]
    use_our_adam()
    assert values() == [value for _, _, value in _REPLACED]


@pytest.mark.usefixtures("untouched")
def test_a_fused_adam_that_is_there_stays(monkeypatch):
    monkeypatch.setattr(importlib.import_module("megatron.core.optimizer"), "USING_PYTORCH_OPTIMIZER", False)
    before = values()
    use_our_adam()
    assert values() == before


@pytest.mark.usefixtures("untouched")
def test_a_missing_name_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(megatron, "_REPLACED", (*_REPLACED, ("megatron.core.optimizer", "NO_SUCH_FLAG", True)))
    with pytest.raises(RuntimeError, match=r"megatron-core \d+\..*NO_SUCH_FLAG"):
        use_our_adam()
    assert values()[0] is torch.optim.AdamW


def test_which_parameters_decay():
    matrix, vector, scalar = torch.zeros(2, 2), torch.zeros(2), torch.zeros(())
    embedding = "module.module.embedding.word_embeddings.weight"
    assert not has_no_weight_decay(matrix, "module.decoder.layers.0.mlp.linear_fc1.weight", [])
    assert not has_no_weight_decay(matrix, embedding, [])
    assert has_no_weight_decay(vector, "module.decoder.final_layernorm.weight", [])
    assert has_no_weight_decay(matrix, "module.decoder.layers.0.mlp.experts.bias", [])
    assert has_no_weight_decay(scalar, "module.decoder.layers.0.mlp.activation.slope", [])
    # patterns see the name without the wrappers
    assert has_no_weight_decay(matrix, embedding, ["embedding.word_*"])
    assert not has_no_weight_decay(matrix, embedding, ["word_*", "decoder.*"])


def test_hyperparameters_reach_every_group():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = AdamW([{"params": params[:1], "wd_mult": 1.0}, {"params": params[1:], "wd_mult": 0.0}], lr=0.0)
    optim = OptimConfig(lr=1e-3, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-5)
    set_hyperparameters(optimizer, optim)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-5 for group in optimizer.param_groups)
