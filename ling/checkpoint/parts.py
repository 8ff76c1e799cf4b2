"""What this rank holds of a run's state: parts of the checkpoint's tensors, under names that no layout changes.

Model tensors have megatron-core's names and shapes. Optimizer state stands beside them, in the shape of the parameter
that it belongs to: `optimizer.state.{param,exp_avg,exp_avg_sq}.<name>`, where `param` is the fp32 master weight of a
parameter that is not fp32 itself. Nothing depends on how many optimizers there are, how each numbers its parameters, or
how they are split over ranks: a rank's share of a flat buffer is stored as the boxes of the parameter that it covers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from ling.checkpoint.boxes import Box, Index, boxes_of_range, overlap, whole
from ling.checkpoint.names import MOMENTS, scalars_kind, state_key
from ling.parallel import groups


@dataclass
class Part:
    """A box of a checkpointed tensor, and the memory of this rank that holds it.

    Attributes:
        key: name of the tensor in the checkpoint.
        shape: its whole shape.
        start: where the box begins; its size is the shape of `tensor`.
        tensor: a view of the rank's memory, maybe strided; loading writes into it.
        sources: names to load it from, the first that the checkpoint has.
        is_optional: whether it may keep its value where the checkpoint has none of the sources: the scalars that an
            activation learns, for another activation has others.
    """

    key: str
    shape: Index
    start: Index
    tensor: torch.Tensor
    sources: tuple[str, ...]
    is_optional: bool = False

    @property
    def box(self) -> Box:
        """Which elements these are."""
        return Box(self.start, tuple(self.tensor.shape))

    @property
    def bytes(self) -> int:
        """Size in memory and on disk."""
        return self.tensor.numel() * self.tensor.element_size()


@dataclass(frozen=True)
class _Piece:
    """A box of a local tensor, and where it begins in the checkpoint's tensor."""

    key: str
    shape: Index
    local: Box
    start: Index


@dataclass
class _Entry:
    """A local tensor of the model, and the pieces that it is stored as."""

    tensor: torch.Tensor
    pieces: list[_Piece]

    def parts(self, tensor: torch.Tensor, box: Box, name: str | None = None) -> Iterator[Part]:
        """Parts of a tensor that stands for `box` of the local tensor: itself, or the optimizer state `name` of it."""
        for piece in self.pieces:
            common = overlap(piece.local, box)
            if common is None:
                continue
            in_front = len(piece.shape) - len(common.size)
            view = tensor[common.relative_to(box.start).slices()]
            offset = (0,) * in_front + common.relative_to(piece.local.start).start
            start = tuple(a + b for a, b in zip(piece.start, offset, strict=True))
            yield Part(
                key=piece.key if name is None else state_key(name, piece.key),
                shape=piece.shape,
                start=start,
                tensor=view.view((1,) * in_front + common.size),
                sources=_sources(name, piece.key, tensor.dtype),
                is_optional=scalars_kind(piece.key) is not None,
            )


def _sources(name: str | None, key: str, dtype: torch.dtype) -> tuple[str, ...]:
    master = state_key("param", key)
    if name in MOMENTS:
        return (state_key(name, key),)
    return (master, key) if name == "param" or dtype == torch.float32 else (key,)


class RankState:
    """All that a checkpoint takes from, or gives to, this rank.

    Args:
        chunks: the rank's model chunks, wrapped or not.
        optimizer: megatron-core's, or None for the model alone.

    Attributes:
        objects: megatron-core's non-tensor state that this rank is to write, by its name in a checkpoint. It is empty
            but with Transformer Engine, and there for megatron-core's own loader, which asks for it.
    """

    def __init__(self, chunks: list[Any], optimizer: Any = None) -> None:
        self._optimizer = optimizer
        self._entries: dict[int, _Entry] = {}
        self._kept: dict[tuple[int, str | None], tuple[torch.Tensor, int, list[Part]]] = {}
        self.objects: dict[str, Any] = {}
        # gathers nothing: the metadata only says in which of its formats megatron-core describes the tensors
        metadata = {"singleton_local_shards": False, "dp_cp_group": groups.data_with_context()}
        for chunk in chunks:
            while hasattr(chunk, "module"):
                chunk = chunk.module
            for value in nested_values(chunk.sharded_state_dict(metadata=metadata)):
                if isinstance(value, ShardedObject) and is_main_replica(value.replica_id):
                    self.objects[value.unique_key] = [value.data]  # a list, as megatron-core stores it
                elif isinstance(value, (ShardedTensor, ShardedTensorFactory)):
                    self._entries[id(value.data)] = _Entry(value.data, _pieces(value))

    def model_parts(self) -> list[Part]:
        """Weights and buffers."""
        return [part for key, entry in self._entries.items() for part in self._model_parts(key, entry)]

    def master_parts(self) -> list[Part]:
        """fp32 master weights, where the model's own weights are not fp32."""
        return [
            part
            for param, first, last, main, _ in self._optimized()
            if main.untyped_storage().data_ptr() != param.untyped_storage().data_ptr()
            for part in self._flat_parts(param, first, last, main, "param")
        ]

    def moment_parts(self) -> list[Part]:
        """Both moments of Adam; made of zeros where no step was taken yet, as the optimizer would."""
        parts = []
        for param, first, last, main, adam in self._optimized():
            state = adam.state[main]
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(main, dtype=torch.float32)
                parts += self._flat_parts(param, first, last, state[name], name)
        return parts

    @property
    def optimizer_step(self) -> int:
        """Updates that the optimizer of this rank has counted; 0 where the rank has no parameters."""
        return max((int(group.get("step") or 0) for group in self._groups()), default=0)

    @optimizer_step.setter
    def optimizer_step(self, step: int) -> None:
        for group in self._groups():
            group["step"] = step

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in _optimizers(self._optimizer):
            yield from optimizer.optimizer.param_groups

    def _model_parts(self, key: int, entry: _Entry) -> list[Part]:
        box = whole(tuple(entry.tensor.shape))
        return self._keep(key, None, entry.tensor, lambda: list(entry.parts(entry.tensor.detach(), box)))

    def _flat_parts(self, param: Any, first: int, last: int, state: torch.Tensor, name: str) -> list[Part]:
        def make() -> list[Part]:
            parts: list[Part] = []
            flat, taken = state.detach().view(-1), 0
            for box in boxes_of_range(tuple(param.shape), first, last):
                parts += self._entries[id(param)].parts(flat[taken : taken + box.numel].view(box.size), box, name)
                taken += box.numel
            return parts

        return self._keep(id(param), name, state, make)

    def _keep(self, key: int, name: str | None, tensor: torch.Tensor, make: Callable[[], list[Part]]) -> list[Part]:
        """The parts of a tensor, made once while it is the same memory: the run waits while a save asks for them."""
        kept = self._kept.get((key, name))
        if kept is None or kept[0] is not tensor or kept[1] != tensor.data_ptr():
            kept = self._kept[key, name] = (tensor, tensor.data_ptr(), make())
        return kept[2]

    def _optimized(self) -> Iterator[tuple[Any, int, int, torch.Tensor, Any]]:
        """Parameter, range of its flattened elements that this rank updates, their fp32 master, inner optimizer."""
        for optimizer in _optimizers(self._optimizer):
            inner = optimizer.optimizer
            if isinstance(optimizer, DistributedOptimizer):
                for param, (group, order) in optimizer.model_param_group_index_map.items():
                    span = optimizer._get_model_param_range_map(param)["param"]
                    yield param, span.start, span.end, inner.param_groups[group]["params"][order], inner
            else:
                for param, main in _masters(optimizer):
                    yield param, 0, param.numel(), main, inner


def _optimizers(optimizer: Any) -> list[Any]:
    """megatron-core's optimizers behind one, without those that have nothing to update on this rank."""
    if optimizer is None:
        return []
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each for each in chained if not getattr(each, "is_stub_optimizer", False)]


def _masters(optimizer: Any) -> Iterator[tuple[Any, Any]]:
    """Parameter and master of an optimizer that is not split over ranks."""
    if not isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for group in optimizer.optimizer.param_groups:
            yield from ((param, param) for param in group["params"])
        return
    for params, masters in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
        yield from zip(params, masters, strict=True)
    for params in optimizer.fp32_from_fp32_groups:
        yield from ((param, param) for param in params)


def _pieces(value: Any) -> list[_Piece]:
    if isinstance(value, ShardedTensor):
        return [_Piece(value.key, tuple(value.global_shape), whole(tuple(value.data.shape)), _start(value))]
    built = list(nested_values({"built": value.build()}))
    for dim in range(value.data.dim()):
        boxes = _along(dim, [tuple(each.data.shape) for each in built], tuple(value.data.shape))
        pairs = list(zip(built, boxes, strict=bool(boxes)))
        if pairs and all(torch.equal(each.data, value.data[box.slices()]) for each, box in pairs):
            return [_Piece(each.key, tuple(each.global_shape), box, _start(each)) for each, box in pairs]
    raise RuntimeError(f"{value.key}: megatron-core stores this tensor other than as slices along one dimension")


def _start(tensor: ShardedTensor) -> Index:
    return tuple(int(offset) for offset in tensor.global_offset)


def _along(dim: int, shapes: list[Index], shape: Index) -> list[Box]:
    """Boxes of tensors that lie one after the other along a dimension; none where their shapes do not allow it."""
    boxes, taken = [], 0
    for each in shapes:
        if len(each) != len(shape) or any(each[d] != shape[d] for d in range(len(shape)) if d != dim):
            return []
        boxes.append(Box(tuple(taken if d == dim else 0 for d in range(len(shape))), each))
        taken += each[dim]
    return boxes if taken == shape[dim] else []
