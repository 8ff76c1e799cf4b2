"""Planned parameters, gradients and optimizer state against models that are really built, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ling.config import Config
from ling.parallel import groups
from ling.plan.activations import Storage, in_flight
from ling.plan.layout import ModelShapes, make_layout
from ling.plan.memory import Buffer, make_buffer, states
from tests.dist.training import DENSE, MOE, tiny_config

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP, EP = {"pipeline_model_parallel_size": 2}, {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, Any, dict[str, Any], str]] = {
    "one rank": (1, MOE, {}, "fp32"),
    "one rank, bf16": (1, MOE, {}, "bf16"),
    "DP 2": (2, MOE, {}, "bf16"),
    "DP 3": (3, MOE, {}, "bf16"),
    "DP 4, dense": (4, DENSE, {}, "fp32"),
    "DP 2, whole optimizer": (2, MOE, {"use_distributed_optimizer": False}, "bf16"),
    "TP 2": (2, MOE, SP, "bf16"),
    "TP 2, DP 2": (4, MOE, SP, "fp32"),
    "PP 2": (2, MOE, PP, "bf16"),
    "PP 2, VPP 2": (2, MOE, PP | {"virtual_pipeline_model_parallel_size": 2}, "fp32"),
    "PP 2, uneven, DP 2": (4, MOE, PP | {"num_layers_per_stage": [3, 1]}, "bf16"),
    "EP 2": (2, MOE, EP, "bf16"),
    "EP 2, DP 4": (4, MOE, EP, "bf16"),
    "EP 2, PP 2": (4, MOE, EP | PP, "fp32"),
    "TP 2, EP 2": (4, MOE, SP | EP, "bf16"),
    "EP 2, whole optimizer": (4, MOE, EP | {"use_distributed_optimizer": False}, "bf16"),
}


def config_of(name: str) -> Config:
    size, model, parallel, recipe = LAYOUTS[name]
    batch = {"micro_batch_size": 1, "global_batch_size": 12}
    return tiny_config(size, model, parallel=parallel, precision={"recipe": recipe}, train=batch)


def build_and_weigh(name: str) -> dict[str, Any]:
    """Build model and optimizer of this rank, take one step without gradients, and count bytes."""
    from megatron.core import parallel_state

    from ling.model.build import build_model, wrap_model
    from ling.optim.megatron import build_optimizer
    from ling.platform import get_platform
    from ling.platform.select import choose

    config = config_of(name)
    bf16 = config.precision.recipe == "bf16"
    groups.build_groups(config.parallel)
    groups.seed_random_states(config.run.seed)
    platform = get_platform("cpu")
    operations = {name: choice.implementation for name, choice in choose(config.runtime, "cpu").items()}
    model = build_model(config, platform.device, bf16=bf16, operations=operations)
    chunks = wrap_model(config, model, platform, bf16=bf16)
    optimizer = build_optimizer(config, chunks, bf16=bf16, use_gloo_process_groups=False)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.step()
    buffers = [buffer for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    parameters = [param for chunk in chunks for param in chunk.parameters()]
    return {
        "stage": groups.pipeline().rank,
        "places": (groups.data().rank, parallel_state.get_expert_data_parallel_rank()),
        "parameters": sum(param.numel() for param in parameters),
        "weights": sum(param.nbytes for param in parameters),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": optimizer_bytes(optimizer, masters=bf16),
    }


def optimizer_bytes(optimizer: Any, *, masters: bool) -> int:
    """Moments, and fp32 weights where they are no views of the model's."""
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                held = [tensor for tensor in part.optimizer.state[param].values() if torch.is_tensor(tensor)]
                total += sum(tensor.nbytes for tensor in held) + (param.nbytes if masters else 0)
    return total


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_of_every_rank(ranks, name):
    config = config_of(name)
    layout, shapes, storage = make_layout(config, LAYOUTS[name][0]), ModelShapes(config.model), Storage.of(config)
    fullest = {}
    for built in ranks.run(LAYOUTS[name][0], build_and_weigh, name):
        stage = layout.stages[built["stage"]]
        planned = states(config, layout, stage, shapes, storage, built["places"])
        for key in ("parameters", "weights", "gradients", "optimizer"):
            assert getattr(planned, key) == built[key], (key, built["places"], built["stage"])
        fullest[stage.index] = max(fullest.get(stage.index, 0), built["optimizer"])
    for index, most in fullest.items():
        bound = states(config, layout, layout.stages[index], shapes, storage).optimizer
        assert most <= bound <= 1.02 * most


def test_buckets_end_where_the_ranks_divide_them():
    buffer = make_buffer([100, 1000, 64], 3, expert=False, distributed=True, bucket=900)
    assert buffer == Buffer(False, ((0, 64), (64, 1064), (1152, 1252)), ((0, 1152), (1152, 1536)), 3)
    assert sum(buffer.owned(rank) for rank in range(3)) == 1164
    assert buffer.owned(0) == 384 + 100


def test_micro_batches_in_flight():
    config = config_of("PP 2")
    layout = make_layout(config, 2)
    assert [in_flight(layout, stage, 0, 12) for stage in range(2)] == [2, 1]
    assert in_flight(layout, 0, 0, 1) == 1
    interleaved = make_layout(config_of("PP 2, VPP 2"), 2)
    # stage 0 runs 2 (2 - 0 - 1) + 1 · 2 chunks ahead of its first backward pass, and one more
    assert [in_flight(interleaved, 0, chunk, 12) for chunk in range(2)] == [3, 2]
    assert [in_flight(interleaved, 1, chunk, 12) for chunk in range(2)] == [2, 1]
