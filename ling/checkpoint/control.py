"""What the ranks tell each other while they save and load: small objects, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Control:
    """Collective calls over all ranks, which all ranks must make in the same order. A world of one talks to itself."""

    def __init__(self) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        # with NCCL alone, each of these small messages would wait for the work queued on the GPU
        needs_gloo = self.size > 1 and dist.get_backend() != "gloo"
        self._group = dist.new_group(backend="gloo") if needs_gloo else None

    def gather(self, value: T) -> list[T]:
        """Everybody's value on rank 0, by rank; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values: Any = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def everyone(self, value: T) -> list[T]:
        """Everybody's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: Any = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def all_true(self, value: bool) -> bool:
        """Whether the value is true on every rank."""
        if self.size == 1:
            return value
        flag = torch.tensor([int(value)])
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._group)
        return bool(flag)

    def from_main(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0; its result, or the exception that it raised, is every rank's."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def share_out(self, function: Callable[[], list[T]]) -> T:
        """Call a function on rank 0, which returns a value for each rank, or raises for all of them."""
        values: Any = None
        if self.rank == 0:
            try:
                values = function()
            except Exception as error:
                values = [error] * self.size
        if self.size == 1:
            mine = values[0]
        else:
            received: list[Any] = [None]
            dist.scatter_object_list(received, values, src=0, group=self._group)
            mine = received[0]
        if isinstance(mine, Exception):
            raise mine
        return mine
