"""Every parallel layout computes what a single rank computes: from the same seed, in fp32, over ten steps.

Weights after training are compared with SwiGLU: the derivative of PowLU jumps at 0, where a rounding difference would
turn into a difference of a whole token's gradient.
"""

from dataclasses import replace

import pytest
import torch

from ling.config import Config
from ling.config.schema import ModelConfig
from ling.trainer import Trainer
from tests.dist.ranks import Ranks
from tests.dist.training import (
    DENSE,
    MOE,
    Outcome,
    Place,
    bare_chunks,
    build_trainer,
    global_state,
    part_of,
    tiny_config,
    train_losses,
)

STEPS = 10
FIRST_LOSS, LATER, WEIGHTS = 1e-6, 1e-4, 1e-4

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {"virtual_pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
# name: ranks, sequences of a micro-batch (of 4 in a step), layout
LAYOUTS = {
    "DP2": (2, 2, {}),
    "DP2, overlapped": (2, 1, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "DP2, whole optimizer": (2, 1, {"use_distributed_optimizer": False}),
    "TP2": (2, 4, {"tensor_model_parallel_size": 2}),
    "TP2+SP": (2, 4, TP),
    "PP2": (2, 1, PP),
    "PP2 interleaved": (2, 1, PP | INTERLEAVED),
    "EP2": (2, 2, EP),
    "TP2xEP2": (2, 4, TP | EP),
    "TP2xPP2": (4, 2, TP | PP),
    "PP2xEP2": (4, 1, PP | EP),
    "DP2xEP2": (4, 1, EP),
}
# tensor parallelism without sequence parallelism is for dense models only
MODELS = {"moe": replace(MOE, activation="swiglu"), "dense": replace(DENSE, activation="swiglu"), "powlu": MOE}
CASES = [
    *(("moe", name) for name in LAYOUTS if name != "TP2"),
    *(("dense", name) for name in ("TP2", "TP2+SP", "PP2", "TP2xPP2")),
    *(("powlu", name) for name in ("DP2", "EP2")),
]


@pytest.fixture(scope="module")
def single(ranks):
    """What a single rank gets with a model; each is trained once."""
    outcomes: dict[str, Outcome] = {}

    def get(model: str) -> Outcome:
        if model not in outcomes:
            (outcomes[model],) = ranks.run(1, train_losses, tiny_config(model=MODELS[model]), STEPS)
        return outcomes[model]

    return get


def layout_config(model: ModelConfig, layout: str) -> tuple[int, Config]:
    """Ranks and config of a layout of the table."""
    size, micro_batch_size, parallel = LAYOUTS[layout]
    return size, tiny_config(size, model, parallel=parallel, train={"micro_batch_size": micro_batch_size})


def worst(ours: list[float], theirs: list[float]) -> float:
    """The largest relative deviation."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("model", "layout"), CASES, ids=[f"{model}-{layout}" for model, layout in CASES])
def test_a_layout_trains_like_a_single_rank(ranks: Ranks, single, model, layout):
    size, config = layout_config(MODELS[model], layout)
    outcomes = ranks.run(size, train_losses, config, STEPS)
    check_course(outcomes, single(model))
    if model != "powlu":
        check_weights(outcomes, single(model))


def check_course(outcomes: list[Outcome], alone: Outcome) -> None:
    """Every rank reports the numbers of the single rank."""
    for outcome in outcomes:
        assert worst(outcome.losses[:1], alone.losses[:1]) <= FIRST_LOSS
        assert worst(outcome.losses, alone.losses) <= LATER
        assert worst(outcome.mtp_losses, alone.mtp_losses) <= LATER
        assert worst(outcome.grad_norms, alone.grad_norms) <= LATER
        for name, bias in outcome.router_biases.items():
            assert torch.equal(bias, alone.router_biases[name]), name
    assert set().union(*(outcome.router_biases for outcome in outcomes)) == set(alone.router_biases)


def check_weights(outcomes: list[Outcome], alone: Outcome) -> None:
    """Every rank's parts are those of the single rank's weights, and together they are all of them."""
    for outcome in outcomes:
        for name, part in outcome.weights.items():
            expected = part_of(name, alone.weights[name], outcome.place)
            deviation = float((part - expected).norm() / expected.norm())
            assert deviation <= WEIGHTS, f"{name} at {outcome.place}: {deviation:.1e}"
    assert set().union(*(outcome.weights for outcome in outcomes)) == set(alone.weights)


def forget_norms(trainer: Trainer) -> None:
    """The gradients of the norms before attention stay those of a rank's own part of the sequence."""
    for chunk in bare_chunks(trainer):
        for name, param in chunk.named_parameters():
            if name.endswith("input_layernorm.weight"):
                param.sequence_parallel = False


def forget_experts(trainer: Trainer) -> None:
    """The gradients of the experts stay those of a rank's own samples."""
    for chunk in trainer.chunks:
        for group in chunk.expert_parallel_bucket_groups:
            group.start_grad_sync = group.finish_grad_sync = lambda *args, **kwargs: None


@pytest.mark.parametrize(("layout", "fault"), [("TP2+SP", forget_norms), ("DP2xEP2", forget_experts)])
def test_a_forgotten_reduction_does_not_pass(ranks: Ranks, single, layout, fault):
    size, config = layout_config(MODELS["moe"], layout)
    outcomes = ranks.run(size, train_losses, config, STEPS, fault)
    for check in (check_course, check_weights):
        with pytest.raises(AssertionError):
            check(outcomes, single("moe"))


def test_the_single_rank_learns(single):
    """The comparison would prove little of a run that stands still or whose router never moves."""
    for model in MODELS:
        alone = single(model)
        assert alone.losses[-1] < alone.losses[0] - 0.1
        assert all(bias.abs().max() > 2e-3 for bias in alone.router_biases.values())
        assert len(alone.router_biases) == (0 if model == "dense" else 4)


@pytest.mark.parametrize("size", [1, 2])
def test_bf16_stays_near_fp32(ranks: Ranks, single, size):
    parallel = EP if size == 2 else {}
    config = tiny_config(size, MODELS["powlu"], parallel=parallel, precision={"recipe": "bf16"})
    outcome = ranks.run(size, train_losses, config, STEPS)[0]
    alone = single("powlu")
    assert 0 < worst(outcome.losses, alone.losses) <= 0.01
    assert 0 < worst(outcome.mtp_losses, alone.mtp_losses) <= 0.01
    assert outcome.weights["output_layer.weight"].dtype == torch.bfloat16
    assert all(bias.dtype == torch.float32 for bias in outcome.router_biases.values())


def initial_weights(configs: list[Config]) -> list[tuple[Place, dict[str, torch.Tensor]]]:
    """Place and initial weights of this rank, by global name, on one layout after the other."""
    found = []
    for config in configs:
        weights = {}
        for chunk in bare_chunks(build_trainer(config)):
            weights |= global_state(chunk)[0]
        found.append((Place.here(), weights))
    return found


@pytest.fixture(scope="module")
def whole(ranks):
    """The initial weights on a single rank, by name."""
    ((_, weights),) = ranks.run(1, initial_weights, [tiny_config()])[0]
    return weights


@pytest.mark.parametrize("size", [2, 4])
def test_initial_weights_do_not_depend_on_the_layout(ranks: Ranks, whole, size):
    names = [name for name, (ranks_needed, _, _) in LAYOUTS.items() if ranks_needed == size and name != "TP2"]
    by_rank = ranks.run(size, initial_weights, [layout_config(MOE, name)[1] for name in names])
    for layout, parts in zip(names, zip(*by_rank, strict=True), strict=True):
        for place, weights in parts:
            for name, part in weights.items():
                assert torch.equal(part, part_of(name, whole[name], place)), f"{layout}: {name} at {place}"
        assert set().union(*(weights for _, weights in parts)) == set(whole), layout
    distinct = {float(weight.flatten()[0]) for name, weight in whole.items() if weight.dim() > 1}
    assert len(distinct) == sum(weight.dim() > 1 for weight in whole.values())
