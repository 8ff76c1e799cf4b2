"""FFN activations by their `hidden_act`. An export ships this file with those of its model at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor  # noqa: F401  (in annotations of the functions below)


@dataclass(frozen=True)
class Row:
    """An activation.

    math: takes gate and up (or the one projection), and by name the settings, `scalars` and `rows`.
    name: begins the names of its settings in config.json.
    gated: whether the FFN has a gate projection.
    params: settings that are numbers or words; null is a limit that is off.
    learnable: settings that together are the tensor `scalars`, their initial values.
    rowwise: whether `math` takes `rows`.
    """

    math: Callable[..., Any]
    name: str
    gated: bool
    params: tuple[str, ...] = ()
    learnable: tuple[str, ...] = ()
    rowwise: bool = False


ROWS: dict[str, Row] = {}
