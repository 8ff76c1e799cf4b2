"""The linear layers of a backend: megatron-core's own, or Transformer Engine's."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


class Linears(NamedTuple):
    """Classes that split a matrix over the tensor-parallel ranks.

    `column` splits its output, `row` its input; `norm_and_column` is an RMSNorm and a column-parallel layer in one,
    None where the backend has no such thing and the norm stands before the layer.
    """

    column: type
    row: type
    norm_and_column: type | None


def linears(config: Any) -> Linears:
    """The linear layers that `ling.platform.select` chose; `config` is megatron-core's TransformerConfig."""
    if config.operations["linear"] == "te":
        from ling.model.te import LINEARS

        return LINEARS
    return Linears(ColumnParallelLinear, RowParallelLinear, None)
