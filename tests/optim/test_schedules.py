"""The learning rate: values at the borders, shapes against formulas written apart, and no hidden state."""

import math

import pytest
import torch

from ling.config.errors import UserError
from ling.config.schema import OptimConfig, TrainConfig
from ling.optim.schedules import learning_rate, recovery_factor, set_learning_rate

ITERS, WARMUP = 100, 10


def optim(**kwargs):
    return OptimConfig(**{"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_iters": WARMUP, **kwargs})


def curve(config, upto=ITERS):
    return [learning_rate(step, config, ITERS) for step in range(1, upto + 1)]


@pytest.mark.parametrize("style", ["constant", "cosine", "WSD"])
def test_warmup_rises_from_a_first_update_that_is_not_zero(style):
    config = optim(lr_decay_style=style, lr_wsd_decay_iters=20)
    rates = curve(config)
    assert rates[:WARMUP] == pytest.approx([1e-3 * (i + 1) / WARMUP for i in range(WARMUP)])
    assert rates[WARMUP - 1] == 1e-3
    assert max(rates) == 1e-3


def test_constant():
    assert set(curve(optim(lr_decay_style="constant", lr_warmup_iters=0), ITERS + 50)) == {1e-3}


def test_cosine():
    config = optim()
    rates = curve(config, ITERS + 20)
    for step in range(WARMUP + 1, ITERS + 1):
        angle = math.pi * (step - WARMUP) / (ITERS - WARMUP)
        assert rates[step - 1] == pytest.approx(1e-4 + 9e-4 * math.cos(angle / 2) ** 2, rel=1e-12)
    assert learning_rate((WARMUP + ITERS) // 2, config, ITERS) == pytest.approx(5.5e-4)
    assert rates[ITERS - 1 :] == [1e-4] * 21
    assert all(a > b for a, b in zip(rates[WARMUP - 1 : ITERS - 1], rates[WARMUP:ITERS], strict=True))


def test_cosine_that_ends_before_the_run():
    config = optim(lr_decay_iters=60)
    assert learning_rate(59, config, ITERS) > 1e-4
    assert learning_rate(60, config, ITERS) == learning_rate(100, config, ITERS) == 1e-4
    # train_iters plays no part then
    assert curve(config) == [learning_rate(step, config, 10**6) for step in range(1, ITERS + 1)]


SHAPES = {
    "linear": lambda left: left,
    "cosine": lambda left: math.sin(math.pi / 2 * left) ** 2,
    "exponential": lambda left: 2**left - 1,
    "minus_sqrt": lambda left: 1 - (1 - left) ** 0.5,
}


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_wsd(shape):
    config = optim(lr_decay_style="WSD", lr_wsd_decay_iters=20, lr_wsd_decay_style=shape)
    rates = curve(config, ITERS + 5)
    assert rates[WARMUP - 1 : 80] == [1e-3] * 71
    for step in range(81, ITERS + 1):
        left = (ITERS - step) / 20
        assert rates[step - 1] == pytest.approx(1e-4 + 9e-4 * SHAPES[shape](left), rel=1e-9)
    assert rates[ITERS - 1 :] == [1e-4] * 6
    assert all(a > b for a, b in zip(rates[79 : ITERS - 1], rates[80:ITERS], strict=True))


def test_wsd_needs_a_length():
    with pytest.raises(UserError, match="lr_wsd_decay_iters"):
        learning_rate(50, optim(lr_decay_style="WSD"), ITERS)


def test_no_warmup_and_one_step():
    assert learning_rate(1, optim(lr_warmup_iters=0, lr_decay_style="constant"), 1) == 1e-3
    assert learning_rate(1, optim(lr_warmup_iters=0), 1) == 1e-4
    assert learning_rate(1, optim(lr_warmup_iters=0), 1000) == pytest.approx(1e-3, rel=1e-5)


def test_it_is_a_function_of_the_step_alone():
    config = optim(lr_decay_style="WSD", lr_wsd_decay_iters=20)
    forward = curve(config)
    backward = [learning_rate(step, config, ITERS) for step in range(ITERS, 0, -1)]
    assert forward == backward[::-1]


def test_the_rate_reaches_every_group():
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr_mult": 0.5}], lr=1.0)
    set_learning_rate(optimizer, 2e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 1e-3]


def test_recovery_ends_after_its_steps():
    train = TrainConfig(train_iters=ITERS, global_batch_size=1, recovery_steps=3, recovery_lr_factor=0.25)
    assert [recovery_factor(steps, train) for steps in range(1, 6)] == [0.25, 0.25, 0.25, 1.0, 1.0]
    off = TrainConfig(train_iters=ITERS, global_batch_size=1)
    assert {recovery_factor(steps, off) for steps in range(1, 6)} == {1.0}
