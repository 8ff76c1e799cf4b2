"""Verification agrees with a faithful export, and catches every mistake that a converter can make."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ling.config.errors import UserError
from ling.hf.compare import Outputs, compare
from ling.hf.export import Options, export, open_source
from ling.hf.importing import import_model
from ling.hf.samples import Sample
from ling.hf.streamed import stream_weights, weights_on_meta
from ling.hf.verify import our_outputs, verify
from tests.activations.specs import NAMES, spec
from tests.hf.directories import DENSE, MOE, draw, edit_config, make_checkpoint, needs_transformers, read_all, rewrite

pytestmark = pytest.mark.ranks(1)
LAYER, EXPERT = "model.layers.1.", "model.layers.1.mlp.experts."


def sample() -> Sample:
    return Sample(torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(1)), "the test")


def exported(folder: Path, model, stored=torch.float32, **options):
    checkpoint = make_checkpoint(folder / "checkpoint", model, dtype=stored)
    export(checkpoint, folder / "hf", Options(**options))
    return open_source(checkpoint)


@torch.no_grad()
@pytest.mark.parametrize("name", ["moe", "dense", "scalars for all"])
def test_our_side_is_what_a_restored_model_computes(tmp_path, name):
    """The streamed model against the one that `ling eval` builds."""
    from ling.checkpoint.parts import RankState
    from ling.checkpoint.torch_dist import Reader
    from tests.dist.training import build_single, tiny_config

    shared = replace(MOE, activation={"name": "crrelu", "learn": "global"})
    model = {"moe": MOE, "dense": DENSE, "scalars for all": shared}[name]
    folder = make_checkpoint(tmp_path / "checkpoint", model)
    tokens = sample().tokens
    ours = our_outputs(open_source(folder), tokens)
    restored = build_single(tiny_config(model=model)).eval()
    Reader(folder).load(RankState([restored]).model_parts())
    logits = restored(tokens, torch.arange(20).expand(2, 20), None)
    torch.testing.assert_close(ours.logits, logits, atol=1e-6, rtol=0)


@needs_transformers
@pytest.mark.parametrize("name", ["moe", "dense", "bf16", "fp32 to bf16", "no MTP", "mixed"])
def test_a_faithful_export(tmp_path, name):
    models = {
        "dense": DENSE,
        "no MTP": replace(MOE, mtp_num_layers=0),
        "mixed": replace(MOE, routed_activation="gelu", shared_activation="swiglu"),
    }
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    options = {"dtype": "bfloat16"} if name == "fp32 to bf16" else {}
    source = exported(tmp_path, models.get(name, MOE), dtype, **options)
    verdict = verify(source, tmp_path / "hf", sample())
    assert not verdict.problems, verdict.text
    assert "verified" in verdict.text
    assert not (tmp_path / "hf" / "__pycache__").exists()


@needs_transformers
@pytest.mark.parametrize("name", NAMES)
def test_every_activation_of_the_registry(tmp_path, name):
    """An activation needs its row and its function, and nothing here: it is exported, computes the same, comes back."""
    source = exported(tmp_path, replace(MOE, num_layers=2, activation=spec(name)))
    verdict = verify(source, tmp_path / "hf", sample())
    assert not verdict.problems, verdict.text
    import_model(tmp_path / "hf", tmp_path / "again")
    first, again = source.reader, open_source(tmp_path / "again").reader
    assert set(first.tensors) == set(again.tensors)
    assert all(torch.equal(first.read(key), again.read(key)) for key in first.tensors)


@needs_transformers
@pytest.mark.parametrize("learn", ["global", "fixed", "per_layer"])
def test_scalars_of_an_activation(tmp_path, learn):
    settings = {"learn": learn, "s": 0.3}
    source = exported(tmp_path, replace(MOE, num_layers=2, activation=spec("leaky_relu", **settings)))
    verdict = verify(source, tmp_path / "hf", sample())
    assert not verdict.problems, verdict.text


@needs_transformers
def test_limits_per_layer_and_kind(tmp_path):
    routed = {"name": "swiglu_clip_post", "limit": [0, 0.2, 0.4, 0.0]}
    model = replace(MOE, activation="swiglu", routed_activation=routed)
    source = exported(tmp_path, model)
    assert not verify(source, tmp_path / "hf", sample()).problems
    edit_config(tmp_path / "hf", routed_swiglu_clip_post_limit=[None, 0.2, 0.3, None])
    assert any("differ" in problem for problem in verify(source, tmp_path / "hf", sample()).problems)


def interleaved(weights):
    """Query/key/value rows as the checkpoint has them."""
    name = LAYER + "attention.query_key_value.weight"
    q, k, v = weights[name].split((64, 32, 32))
    groups = zip(q.split(32), k.split(16), v.split(16), strict=True)
    return {name: torch.cat([part for group in groups for part in group])}


def swapped(first, second):
    return lambda weights: {first: weights[second], second: weights[first]}


def halves(weights):
    name = "model.layers.4.eh_proj.weight"
    return {name: torch.cat(weights[name].chunk(2, dim=1)[::-1], dim=1)}


MISTAKES = {
    "query, key and value left interleaved": interleaved,
    "norms of query and key swapped": swapped(
        LAYER + "attention.query_layernorm.weight", LAYER + "attention.key_layernorm.weight"
    ),
    "gate and up swapped": swapped(EXPERT + "3.gate_proj.weight", EXPERT + "3.up_proj.weight"),
    "gate and up of the dense layer swapped": swapped(
        "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    ),
    "experts swapped": swapped(EXPERT + "2.down_proj.weight", EXPERT + "5.down_proj.weight"),
    "router bias dropped": lambda weights: {
        LAYER + "mlp.gate.expert_bias": torch.zeros_like(weights[LAYER + "mlp.gate.expert_bias"])
    },
    "halves of eh_proj swapped": halves,
    "norms of MTP swapped": swapped("model.layers.4.enorm.weight", "model.layers.4.hnorm.weight"),
    "norms of a layer swapped": swapped(LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight"),
    "layers swapped": swapped("model.layers.1.attention.dense.weight", "model.layers.2.attention.dense.weight"),
}
WRONG_CONFIGS = {
    "wrong rope_theta": {"rope_theta": 600000.0},
    "whole rotary": {"rotary_dim": 16, "partial_rotary_factor": 1.0},
    "eps 1e-5": {"rms_norm_eps": 1e-5},
    "scaling factor": {"routed_scaling_factor": 2.4},
    "no groups": {"n_group": 1, "topk_group": 1},
    "power": {"powlu_m": 2.9},
}


@needs_transformers
def test_mistakes_in_the_weights_are_caught(tmp_path):
    source = exported(tmp_path, MOE)
    right = read_all(tmp_path / "hf")
    for name, mistake in MISTAKES.items():
        rewrite(tmp_path / "hf", mistake(right))
        verdict = verify(source, tmp_path / "hf", sample())
        assert any("differ by" in problem for problem in verdict.problems), name
        if name == "router bias dropped":
            assert any("experts [" in problem for problem in verdict.problems)
        if "MTP" in name or "eh_proj" in name:
            assert not any(problem.startswith("logits") for problem in verdict.problems), name
        rewrite(tmp_path / "hf", right)
    assert not verify(source, tmp_path / "hf", sample()).problems


@needs_transformers
def test_mistakes_in_the_config_are_caught_twice(tmp_path):
    """By their name, and by the numbers that they give."""
    source = exported(tmp_path, MOE)
    right = json.loads((tmp_path / "hf" / "config.json").read_text())
    for name, changes in WRONG_CONFIGS.items():
        edit_config(tmp_path / "hf", **changes)
        problems = verify(source, tmp_path / "hf", sample()).problems
        assert any(next(iter(changes)) in problem for problem in problems), name
        assert any("differ by" in problem for problem in problems), name
        edit_config(tmp_path / "hf", **right)


@needs_transformers
@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "no code"])
def test_what_is_missing_or_unused_is_told(tmp_path, change):
    source = exported(tmp_path, MOE)
    name = EXPERT + "3.up_proj.weight"
    if change == "no code":
        (tmp_path / "hf" / "modeling_bailing_moe_v2.py").unlink()
    else:
        changes = {
            "missing": {name: None},
            "unknown": {name + "2": torch.zeros(2)},
            "shape": {name: torch.zeros(1, 64)},
        }
        rewrite(tmp_path / "hf", changes[change])
    with pytest.raises(UserError, match=str(tmp_path)):
        verify(source, tmp_path / "hf", sample())


def test_ties_between_experts_are_no_difference():
    """Experts 1 and 2 score the same but for rounding: position 1 of sequence 0 and what follows it is left out."""
    logits = torch.randn(2, 4, 8)
    other = logits.clone()
    other[0, 1:] += 1.0
    selection = torch.rand(2, 4, 4) / 4
    selection[0, 1] = torch.tensor([0.9, 0.5, 0.5 + 1e-8, 0.1])
    chosen = torch.tensor([0, 1]).expand(2, 4, 2).clone()
    turned = chosen.clone()
    turned[0, 1, 1] = 2
    sides = Outputs(logits, None, [chosen]), Outputs(other, None, [turned], [selection])
    verdict = compare(*sides)
    assert not verdict.problems, verdict.text
    assert "3 tokens left out" in verdict.text
    selection[0, 1, 2] = 0.6
    assert any("experts [0, 1]" in problem for problem in compare(*sides).problems)
    other[1, 0, 0] = torch.nan
    assert any("logits" in problem for problem in compare(*sides).problems)


def test_scale_of_the_tolerance():
    logits = 10 * torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0))
    chosen: list[torch.Tensor] = []
    assert not compare(Outputs(logits, None, chosen), Outputs(logits + 2e-4, None, chosen)).problems
    assert compare(Outputs(logits, None, chosen), Outputs(logits + 5e-4, None, chosen)).problems
    assert compare(Outputs(logits, logits, chosen), Outputs(logits, None, chosen)).problems


def test_the_worst_position_is_named():
    logits = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[0, 3, 1] += 0.1
    other[1, 7, 5] += 0.2
    chosen = [torch.tensor([0, 1]).expand(2, 20, 2).clone() for _ in range(3)]
    turned = [layer.clone() for layer in chosen]
    turned[1][1, 4, 1] = 2
    scores = [torch.rand(2, 20, 4) + torch.tensor([3.0, 2.0, 1.0, 0.0]) for _ in range(3)]
    verdict = compare(Outputs(logits, logits, chosen), Outputs(other, logits, turned, scores))
    assert "sequence 1, position 7, token 5" in verdict.lines[-2]
    assert verdict.lines[0] == "chosen experts: 119 of 120 choices agree"
    assert verdict.problems[0].startswith("router 1 (of those with experts), sequence 1, position 4: experts [0, 1]")
    assert verdict.text.endswith("NOT the same model")


class Toy(torch.nn.Module):
    """Weights, a buffer that is stored, and a table that is not."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        self.register_buffer("bias", torch.zeros(2))
        self.register_buffer("table", torch.arange(2.0) + 1, persistent=False)

    def forward(self, x):
        return (self.inner(x) + self.bias) * self.table


def test_tables_of_the_code_stay_and_weights_come_when_they_are_needed():
    whole = Toy()
    whole.bias += 3
    stored, x = whole.state_dict(), torch.randn(4, 3)
    with weights_on_meta():
        model = Toy()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    stream_weights(model, stored.__getitem__)
    assert torch.equal(model(x), whole(x))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert not Toy().inner.weight.is_meta


@needs_transformers
def test_neither_side_is_in_memory_as_a_whole(tmp_path):
    """What has been read and is still alive, whenever something is read: never more than the largest module."""
    import weakref
    from unittest.mock import patch

    from ling.hf import verify as module

    model = replace(MOE, num_layers=6)
    source = exported(tmp_path, model)
    most: list[int] = []

    def tracked(streamed, read):
        alive: dict[int, int] = {}
        most.append(0)
        side = len(most) - 1

        def watch(name):
            tensor = read(name)
            key = tensor.data_ptr()
            alive[key] = tensor.nbytes
            weakref.finalize(tensor.untyped_storage(), alive.pop, key, None)
            most[side] = max(most[side], sum(alive.values()))
            return tensor

        stream_weights(streamed, watch)

    with patch.object(module, "stream_weights", tracked):
        assert not verify(source, tmp_path / "hf", sample()).problems
    whole = sum(tensor.nbytes for tensor in read_all(tmp_path / "hf").values())
    assert len(most) == 2
    assert all(0 < size < whole / 4 for size in most), (most, whole)


def test_draws_matter():
    """The tensors of these tests are uneven everywhere, or a swap could pass."""
    tensors = draw(MOE)
    assert all(tensor.std() > 0.01 for tensor in tensors.values() if tensor.numel() > 1)
