"""The table of names: every element of a checkpoint is in a model directory once, at the right place."""

from dataclasses import replace

import pytest
import torch

from ling.config.schema import ModelConfig
from ling.hf.names import by_source, canonical, checkpoint_shapes, pieces, segments
from tests.dist.training import DENSE, MOE
from tests.hf.directories import draw

MODELS = {
    "moe": MOE,
    "dense": DENSE,
    "ungated": replace(MOE, activation="relu2", mtp_num_layers=0),
    "mixed": replace(MOE, routed_activation="gelu", shared_activation="swiglu"),
    "no shared experts, no bias, no norm on heads": replace(
        MOE, moe_shared_expert_intermediate_size=None, moe_router_enable_expert_bias=False, qk_layernorm=False
    ),
    "scalars": replace(MOE, activation="polyrelu"),
    "one scalar for all": replace(MOE, activation={"name": "leaky_relu", "learn": "global"}),
}


def assemble(model: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The directory's tensors by the table."""
    found = {}
    for piece in pieces(model):
        source = tensors[piece.source] if piece.index is None else tensors[piece.source][piece.index]
        found[piece.name] = torch.cat([source[start:stop] for start, stop in piece.rows])
        assert found[piece.name].shape == piece.shape, piece.name
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_element_is_there_once(name):
    model = MODELS[name]
    numbers, shapes = {}, checkpoint_shapes(model)
    first = 0
    for key, shape in shapes.items():
        numbers[key] = torch.arange(first, first + torch.Size(shape).numel()).view(shape)
        first += numbers[key].numel()
    assembled = assemble(model, numbers)
    shared = {key for key in assembled if key.endswith("scalars")} if name == "one scalar for all" else set()
    all_of_them = torch.cat([tensor.flatten() for key, tensor in assembled.items() if key not in shared])
    wanted = torch.cat([tensor.flatten() for key, tensor in numbers.items() if not key.startswith("activation_")])
    assert torch.equal(all_of_them.sort().values, wanted.sort().values)
    if shared:
        assert len(shared) == model.num_layers + model.mtp_num_layers + 4  # shared experts have one, too


def test_rows_of_query_key_value():
    """Against the reference's own split of the interleaved projection."""
    from tests.model.reference import split_qkv

    tensors = draw(MOE)
    x = torch.randn(2, 5, MOE.hidden_size)
    stored = tensors["decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = split_qkv(x @ stored.T, 4, 2, 16)
    theirs = x @ assemble(MOE, tensors)["model.layers.0.attention.query_key_value.weight"].T
    q2, k2, v2 = (part.unflatten(-1, (-1, 16)) for part in theirs.split((64, 32, 32), dim=-1))
    for ours, other in ((q, q2), (k, k2), (v, v2)):
        torch.testing.assert_close(ours, other)


def test_gate_up_and_experts():
    tensors = draw(MOE)
    found = assemble(MOE, tensors)
    fc1 = tensors["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"]
    assert torch.equal(found["model.layers.2.mlp.experts.5.gate_proj.weight"], fc1[5, :32])
    assert torch.equal(found["model.layers.2.mlp.experts.5.up_proj.weight"], fc1[5, 32:])
    dense = tensors["decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(found["model.layers.0.mlp.gate_proj.weight"], dense[:96])
    assert torch.equal(found["model.layers.4.eh_proj.weight"], tensors["mtp.layers.0.eh_proj.weight"])
    bias = "mtp.layers.0.transformer_layer.mlp.router.expert_bias"
    assert torch.equal(found["model.layers.4.mlp.gate.expert_bias"], tensors[bias])


@pytest.mark.parametrize("name", ["moe", "dense", "ungated"])
def test_segments_of_any_slabs_give_the_whole(name):
    model = MODELS[name]
    tensors = draw(model)
    found = {piece.name: torch.full(piece.shape, torch.nan) for piece in pieces(model)}
    for source, group in by_source(pieces(model)).items():
        length = tensors[source].shape[0]
        for first in range(0, length, 3):
            last = min(first + 3, length)
            for segment in segments(group, first, last):
                rows = segment.view(tensors[source][first:last], first)
                found[segment.piece.name][segment.row : segment.row + len(rows)] = rows
    for key, tensor in assemble(model, tensors).items():
        assert torch.equal(found[key], tensor), key


def test_the_newer_name_of_the_layer_inside_mtp():
    assert canonical("mtp.layers.0.mtp_model_layer.mlp.router.weight") in checkpoint_shapes(MOE)
