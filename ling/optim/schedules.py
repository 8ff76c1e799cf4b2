"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

A step is one update of the weights, counted from 1: `learning_rate(1)` is the rate of the first update. The formulas
are Megatron-LM's, which evaluates them at the number of updates already made (so that its first update has the rate 0);
here they are evaluated at the number that includes the present one: the peak is reached at step `lr_warmup_iters`, and
`min_lr` at step `lr_decay_iters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ling.config.errors import UserError
from ling.config.schema import OptimConfig, TrainConfig

# Progress of the decay, 0 to 1, to the part of lr - min_lr that is left, 1 to 0.
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    # half-life of one decay length, shifted so that it ends at 0 (Megatron-LM's form)
    "exponential": lambda progress: 2.0 * 0.5**progress - 1.0,
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


def learning_rate(step: int, optim: OptimConfig, train_iters: int) -> float:
    """The learning rate of one update.

    Args:
        step: number of the update, from 1.
        optim: peak, minimum, warm-up and decay; `lr_decay_iters: null` means train_iters.
        train_iters: steps of the whole run.

    Returns:
        lr * step / lr_warmup_iters during the warm-up (its last step has the full lr). Then, with the style
        `constant`: lr. `cosine`: half a cosine from lr to min_lr at lr_decay_iters. `WSD`: lr, and over the last
        lr_wsd_decay_iters steps before lr_decay_iters the decay to min_lr in the chosen shape. After lr_decay_iters
        both stay at min_lr.

    Raises:
        UserError: WSD without lr_wsd_decay_iters.
    """
    if step <= optim.lr_warmup_iters:
        return optim.lr * step / optim.lr_warmup_iters
    if optim.lr_decay_style == "constant":
        return optim.lr
    end = train_iters if optim.lr_decay_iters is None else optim.lr_decay_iters
    if optim.lr_decay_style == "WSD":
        if optim.lr_wsd_decay_iters is None:
            raise UserError("optim.lr_wsd_decay_iters: WSD needs the length of its decay, in steps")
        start, shape = end - optim.lr_wsd_decay_iters, optim.lr_wsd_decay_style
    else:
        start, shape = optim.lr_warmup_iters, optim.lr_decay_style
    if step >= end:
        return optim.min_lr
    progress = max(0.0, (step - start) / (end - start))
    return optim.min_lr + (optim.lr - optim.min_lr) * _SHAPES[shape](progress)


def recovery_factor(steps: int, train: TrainConfig) -> float:
    """What the learning rate is multiplied with after a run began from another run's weights.

    A model whose activation was exchanged has weights that fit the old one; small steps let it settle before the full
    rate could throw it further off.

    Args:
        steps: updates since the run began, the present one included.
        train: `recovery_steps` and `recovery_lr_factor`.

    Returns:
        The factor for the first `recovery_steps` updates, then 1.
    """
    return train.recovery_lr_factor if steps <= train.recovery_steps else 1.0


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Write the rate into all parameter groups of a torch or megatron-core optimizer, times a group's `lr_mult`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
