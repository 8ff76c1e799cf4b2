"""The routed experts: both ways of multiplying, rows padded and not, and what stands in a checkpoint."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from tests.dist.training import MOE, SyntheticStream, batch_of, build_single, tiny_config

pytestmark = pytest.mark.ranks(1)

EXPERTS, HIDDEN, WIDTH = 8, 64, 32
LOADS = {
    "some": [3, 0, 64, 1, 0, 65, 7, 0],
    "one expert": [0, 0, 0, 5, 0, 0, 0, 0],
    "first and last": [2, 0, 0, 0, 0, 0, 0, 1],
    "none": [0] * EXPERTS,
}


def build(way: str, **model):
    """A model whose experts multiply in one of the two ways."""
    return build_single(tiny_config(model=replace(MOE, num_layers=2, **model), runtime={"grouped_gemm": way}))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("load", LOADS)
def test_products_by_group_are_products_one_by_one(load):
    from ling.model.experts import grouped_linear, looped_linear

    tokens_per_expert = torch.tensor(LOADS[load])
    rows = int(tokens_per_expert.sum())
    results = []
    for multiply in (grouped_linear, looped_linear):
        x = draw(rows, HIDDEN).requires_grad_()
        weight = draw(EXPERTS, WIDTH, HIDDEN, seed=1).requires_grad_()
        out = multiply(x, weight, tokens_per_expert)
        (out * draw(rows, WIDTH, seed=2)).sum().backward()
        results.append((out.detach(), x.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    out, _, weight_grad = results[0]
    expert_of_row = torch.arange(EXPERTS).repeat_interleave(tokens_per_expert)
    expected = torch.einsum("th,tfh->tf", draw(rows, HIDDEN), draw(EXPERTS, WIDTH, HIDDEN, seed=1)[expert_of_row])
    torch.testing.assert_close(out, expected)
    idle = tokens_per_expert == 0
    assert weight_grad[idle].abs().sum() == 0
    assert (weight_grad[~idle].abs().amax(dim=(1, 2)) > 0).all()


def test_where_padded_rows_go():
    from ling.model.experts import aligned_rows

    rows, padded = aligned_rows(torch.tensor([2, 0, 4, 1]), 4)
    assert rows.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert padded.tolist() == [4, 0, 4, 4]
    rows, padded = aligned_rows(torch.tensor([0, 5]), 4)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert padded.tolist() == [0, 8]
    rows, padded = aligned_rows(torch.zeros(3, dtype=torch.int64), 4)
    assert rows.tolist() == []
    assert padded.tolist() == [0, 0, 0]


@pytest.mark.parametrize("way", ["grouped_mm", "loop"])
@pytest.mark.parametrize("load", LOADS)
def test_each_row_passes_its_expert(way, load):
    experts = build(way, activation="swiglu").decoder.layers[1].mlp.experts
    tokens_per_expert = torch.tensor(LOADS[load])
    rows = int(tokens_per_expert.sum())
    x, scale = draw(rows, HIDDEN).requires_grad_(), draw(rows, seed=1).abs().requires_grad_()
    out, bias = experts(x, tokens_per_expert, scale)
    assert bias is None
    wanted = draw(rows, HIDDEN, seed=2)
    grads = torch.autograd.grad((out * wanted).sum(), [x, scale, experts.weight1, experts.weight2])

    plain = []
    for row, expert in enumerate(torch.arange(EXPERTS).repeat_interleave(tokens_per_expert)):
        gate, up = linear(x[row], experts.weight1[expert]).chunk(2)
        plain.append(linear(torch.nn.functional.silu(gate) * up * scale[row], experts.weight2[expert]))
    expected = torch.stack(plain) if plain else out * 0
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-7)
    if rows:
        expected_grads = torch.autograd.grad((expected * wanted).sum(), [x, scale, experts.weight1, experts.weight2])
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)
    else:
        assert out.shape == (0, HIDDEN)
        assert all(grad.abs().sum() == 0 for grad in grads)  # there, and zero: a missing one would stall the reduction


@pytest.mark.parametrize("activation", ["powlu", "gelu"])
def test_the_way_of_multiplying_changes_no_result_and_no_name(activation):
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    batch = batch_of(SyntheticStream(), 0, 2)
    logits, names, checkpoints = [], [], []
    for way in ("grouped_mm", "loop"):
        model = build(way, activation=activation)
        assert model.config.operations["experts"] == way
        logits.append(model(batch["tokens"], batch["position_ids"], None))
        names.append({name: getattr(value, "shape", None) for name, value in model.state_dict().items()})
        state = model.sharded_state_dict()
        apply_factories(state)
        parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
        checkpoints.append({(part.key, part.global_shape, part.global_offset) for part in parts})
    torch.testing.assert_close(logits[0], logits[1])
    assert names[0] == names[1]
    assert checkpoints[0] == checkpoints[1]


@pytest.mark.parametrize("activation", ["powlu", "gelu"])
def test_checkpoint_names_are_those_of_megatrons_sequential_experts(activation):
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    ours = build("loop", activation=activation).decoder.layers[1].mlp.experts
    theirs = SequentialMLP(
        EXPERTS,
        ours.config,
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )

    def whole(experts) -> set:
        state = experts.sharded_state_dict("mlp.experts.")
        apply_factories(state)
        parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
        return {(part.key, part.global_shape) for part in parts}

    assert whole(ours) == whole(theirs)
    fc1_rows = 2 * WIDTH if activation == "powlu" else WIDTH
    assert ("mlp.experts.experts.linear_fc1.weight", (EXPERTS, fc1_rows, HIDDEN)) in whole(ours)
