"""Learnable scalars and row statistics of activations under every layout: gradients, losses and updates of one rank."""

from dataclasses import replace

import pytest
import torch

from ling.config import Config
from tests.dist.training import DENSE, MOE, bare_chunks, batches_of, build_trainer, tiny_config, train_losses

STEPS = 3
GRADIENT, LOSS, UPDATE = 2e-5, 1e-6, 1e-3

# dense, shared and routed FFN of one model
MIXES = {
    "own": (
        {"name": "polynorm", "a0": 0.1},
        {"name": "series", "n": 3, "a": [1.0, 0.5, -0.5], "b": [0.0, 0.2, 0.1]},
        {"name": "crrelu", "epsilon": 0.3},
    ),
    "common": (
        {"name": "polyrelu", "learn": "global"},
        {"name": "leaky_relu", "s": 0.2, "learn": "per_layer"},
        {"name": "leaky_relu", "s": 0.1, "learn": "global"},
    ),
    "rows": ({"name": "topk_relu", "k": 20}, {"name": "polynorm", "learn": "global"}, {"name": "polynorm"}),
    "rows, reference": ({"name": "topk_relu", "k": 20}, {"name": "series"}, {"name": "polynorm"}),
    "dense model": ({"name": "polynorm"}, None, None),
}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
# name: ranks, sequences of a micro-batch (of 4 in a step), layout
LAYOUTS = {
    "DP2": (2, 2, {}),
    "TP2": (2, 4, {"tensor_model_parallel_size": 2}),
    "TP2+SP": (2, 4, TP),
    "PP2": (2, 1, PP),
    "PP2 interleaved": (2, 1, PP | {"virtual_pipeline_model_parallel_size": 2}),
    "EP2": (2, 2, EP),
    "TP2xEP2": (2, 4, TP | EP),
    "TP2xPP2": (4, 2, TP | PP),
    "PP2xEP2": (4, 1, PP | EP),
    "PP2xDP2, sharded optimizer": (4, 1, PP),
}
SHARDED_OPTIMIZER = ("DP2", "PP2xDP2, sharded optimizer")
CASES = [
    *((mix, layout) for mix in ("own", "common", "rows") for layout in ("TP2+SP", "EP2", "PP2 interleaved")),
    ("rows, reference", "TP2+SP"),
    ("dense model", "TP2"),
    ("own", "TP2xEP2"),
    ("common", "DP2"),
    ("common", "PP2xDP2, sharded optimizer"),
    ("common", "PP2xEP2"),
    ("common", "TP2xPP2"),
    ("rows", "TP2xPP2"),
]


def config_of(mix: str, layout: str | None = None) -> tuple[int, Config]:
    dense, shared, routed = MIXES[mix]
    model = replace(MOE, dense_activation=dense, shared_activation=shared, routed_activation=routed)
    if mix == "dense model":
        model = replace(DENSE, activation=dense)
    size, micro, parallel = LAYOUTS[layout] if layout else (1, 4, {})
    # the whole gradient stays on each rank, so that it can be looked at
    parallel = parallel | {"use_distributed_optimizer": layout in SHARDED_OPTIMIZER}
    kernels = "reference" if mix.endswith("reference") else "auto"
    return size, tiny_config(
        size, model, parallel=parallel, train={"micro_batch_size": micro}, runtime={"kernels": kernels}
    )


def scalar_gradients(config: Config) -> dict[str, torch.Tensor]:
    """The gradient of each scalar on this rank after one step's backward pass, by global name."""
    from ling.model.init import global_names

    trainer = build_trainer(config)
    found = {}
    inner = trainer.chunks[0].config.finalize_model_grads_func

    def finalize(*args, **kwargs):
        inner(*args, **kwargs)
        for chunk in bare_chunks(trainer):
            names = global_names(chunk)
            for name, param in chunk.named_parameters():
                if "scalars" in name:
                    found[names[name]] = param.main_grad.clone()

    for chunk in bare_chunks(trainer):
        chunk.config.finalize_model_grads_func = finalize
    trainer.train_step(batches_of(trainer))
    return found


@pytest.fixture(scope="module")
def single(ranks):
    """What a single rank gets with a mix: gradients after one step, outcome of several."""
    known = {}

    def get(mix: str):
        if mix not in known:
            _, config = config_of(mix)
            known[mix] = ranks.run(1, scalar_gradients, config)[0], ranks.run(1, train_losses, config, STEPS)[0]
        return known[mix]

    return get


@pytest.mark.parametrize(("mix", "layout"), CASES)
def test_same_as_one_rank(ranks, single, mix, layout):
    gradients, outcome = single(mix)
    size, config = config_of(mix, layout)
    if layout not in SHARDED_OPTIMIZER:
        seen = set()
        for found in ranks.run(size, scalar_gradients, config):
            for name, gradient in found.items():
                expected = gradients[name]
                assert expected.abs().max() > 0, name
                assert (gradient - expected).abs().max() <= GRADIENT * expected.abs().max(), (name, gradient, expected)
            seen |= found.keys()
        assert seen == gradients.keys()
    for other in ranks.run(size, train_losses, config, STEPS):
        for ours, theirs in ((other.losses, outcome.losses), (other.grad_norms, outcome.grad_norms)):
            assert max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)) <= 10 * LOSS
        for name, weight in other.weights.items():
            if "scalars" in name:
                assert (weight - outcome.weights[name]).abs().max() <= UPDATE * STEPS * config.optim.lr, name


def test_scalars_move_and_are_counted_once(single):
    for mix in MIXES:
        gradients, outcome = single(mix)
        _, config = config_of(mix)
        learnt = {name for name in outcome.weights if "scalars" in name}
        assert learnt == gradients.keys()
        from ling.model.counts import parameter_shapes

        shapes = {name: shape for name, shape in parameter_shapes(config.model).items() if "scalars" in name}
        assert {name: tuple(outcome.weights[name].shape) for name in learnt} == shapes
        assert learnt


def broken(gradients_of: str):
    """A reduction left out."""
    from ling.model import scalars

    return {
        "tensor": ("_all_reduce", lambda tensors, group: None),
        "layers": ("_sum_over_layers", lambda chunks: None),
    }[gradients_of], scalars


def scalar_gradients_without(config: Config, part: str) -> dict[str, torch.Tensor]:
    (name, nothing), module = broken(part)
    kept = getattr(module, name)
    setattr(module, name, nothing)
    try:
        return scalar_gradients(config)
    finally:
        setattr(module, name, kept)


@pytest.mark.parametrize(("part", "layout"), [("tensor", "TP2+SP"), ("layers", "PP2")])
def test_a_missing_reduction_would_be_seen(ranks, single, part, layout):
    gradients, _ = single("common")
    size, config = config_of("common", layout)
    results = ranks.run(size, scalar_gradients_without, config, part)
    assert any(
        (found[name] - gradients[name]).abs().max() > 1e-2 * gradients[name].abs().max()
        for found in results
        for name in found
    )
