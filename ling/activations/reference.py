"""How the registry's math is called: fc1's output, scalars and row statistics to the arguments of one function.

Nothing is widened or rounded here. Torch-free: tensor methods only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ling.activations.table import Activation

if TYPE_CHECKING:
    from torch import Tensor


class WholeRows:
    """What row-wise math asks of the rows `[..., F]` that its input is a part of; here the input is the whole row.

    Where tensor-parallel ranks share a row, an object with the same methods takes its place, which reduces over them.
    `sum` adds statistics of the ranks up, `gather` stacks them as `[ranks, ...]`; neither is differentiable.
    """

    rank, size = 0, 1
    sum = gather = None

    def mean(self, x: Tensor) -> Tensor:
        """The mean over each row, `[..., 1]`."""
        return x.mean(-1, keepdim=True)

    def largest(self, x: Tensor, k: int) -> Tensor:
        """Whether an element is among the k largest of its row, `[..., F]`; of equal ones the first by index are."""
        order = x.argsort(dim=-1, descending=True, stable=True)
        return order.argsort(dim=-1) < k


def phi(
    activation: Activation,
    x: Tensor,
    params: Mapping[str, Any],
    scalars: Tensor | None = None,
    rows: Any = None,
) -> Tensor:
    """An activation of fc1's output, by its reference math, in x's dtype.

    Args:
        activation: a row of the registry.
        x: `[..., 2F]` (gate ‖ up) if gated, else `[..., F]`.
        params: hyper-parameters of the layer, as `ResolvedActivation.for_layer` gives them.
        scalars: 1-D, in x's dtype; needed where the row has learnable ones.
        rows: row statistics where F is a shard; None: WholeRows.

    Returns:
        `[..., F]`
    """
    inputs = x.chunk(2, dim=-1) if activation.gated else (x,)
    named = dict(params)
    if activation.learnable:
        named["scalars"] = scalars
    if activation.rowwise:
        named["rows"] = WholeRows() if rows is None else rows
    return activation.math(*inputs, **named)
