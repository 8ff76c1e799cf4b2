"""Memory of a rank: parameters, gradients and optimizer state to the byte, activations and transients by rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from ling.config.derived import num_microbatches
from ling.config.schema import Config
from ling.model.counts import is_moe_layer
from ling.plan.activations import Storage, Tokens, backward_bytes, chunk_bytes, head_bytes, in_flight
from ling.plan.layout import Layout, ModelShapes, Stage

CONTEXT_GIB = 2.0
"""CUDA context, cuBLAS workspaces and NCCL's buffers, outside torch's allocator."""
FRAGMENTATION = 1.06
"""Memory that torch reserves over what it has allocated, at the peak."""
BUCKET_ELEMENTS, BUCKET_PER_RANK = 40_000_000, 1_000_000
_PARAM_ALIGN, _BUCKET_ALIGN = 64, 128


@dataclass(frozen=True)
class Buffer:
    """megatron-core's contiguous gradient (and parameter) buffer of one kind of parameters on a rank.

    Parameters lie in it from the last to the first, each from a multiple of 64 elements; buckets end at multiples of
    128 and of the data-parallel ranks, which each own an equal slice of every bucket. Without the distributed
    optimizer nothing is padded and nothing is split. `expert`: of experts with data-parallel ranks of their own.
    """

    expert: bool
    spans: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]
    ranks: int

    @property
    def numel(self) -> int:
        """Elements, padding included."""
        return self.buckets[-1][1] if self.buckets else 0

    @property
    def slice(self) -> int:
        """Elements of the buffer that each data-parallel rank has, padding included."""
        return self.numel // self.ranks

    def owned(self, rank: int) -> int:
        """Elements of parameters whose optimizer state a data-parallel rank holds."""
        total, rank = 0, rank % self.ranks
        for start, end in self.buckets:
            size = (end - start) // self.ranks
            low = start + rank * size
            high = low + size
            total += sum(max(0, min(stop, high) - max(first, low)) for first, stop in self.spans)
        return total


def make_buffer(sizes: Sequence[int], ranks: int, *, expert: bool, distributed: bool, bucket: int | None) -> Buffer:
    """The buffer of parameters of so many elements, in the order of the module."""
    if not distributed:
        total = sum(sizes)
        return Buffer(expert, ((0, total),), ((0, total),) if total else (), 1)
    spans, buckets = [], []
    bucket_start = position = 0
    align = math.lcm(ranks, _BUCKET_ALIGN)
    for size in reversed(sizes):
        position = -(-position // _PARAM_ALIGN) * _PARAM_ALIGN
        spans.append((position, position + size))
        position += size
        if bucket is not None and position - bucket_start >= bucket:
            position = -(-position // align) * align
            buckets.append((bucket_start, position))
            bucket_start = position
    if position > bucket_start:
        buckets.append((bucket_start, -(-position // align) * align))
    return Buffer(expert, tuple(spans), tuple(buckets), ranks)


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the rank of a pipeline stage that holds the most; the last four are estimates.

    activations: kept between forward and backward passes, of all micro-batches in flight, with the heads' losses.
    transient: the most that is held besides at one time.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: float
    transient: float

    @property
    def allocated(self) -> float:
        """What torch has allocated at the peak."""
        return sum(getattr(self, row.name) for row in fields(self))

    @property
    def static(self) -> int:
        """Weights, gradients and optimizer: what stays between the steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def needed(self) -> float:
        """What the GPU must have: allocated memory with fragmentation, and what lies outside of torch."""
        return self.static + (self.allocated - self.static) * FRAGMENTATION + CONTEXT_GIB * 2**30


@dataclass(frozen=True)
class States:
    """What one rank of a stage holds between steps: elements of its parameters (`experts`: of those that megatron-core
    reduces over the experts' own data-parallel ranks) and of the optimizer's fp32 state, and bytes."""

    parameters: int
    experts: int
    owned: int
    weights: int
    gradients: int
    optimizer: int


def stage_buffers(config: Config, layout: Layout, stage: Stage, shapes: ModelShapes) -> list[Buffer]:
    """The buffers of a stage's chunks: dense parameters, then experts where these have groups of their own."""
    parallel, buffers = config.parallel, []
    for index, chunk in enumerate(stage.chunks):
        sizes = [size for part in shapes.parts(layout, chunk) for size in part.sizes]
        bucketed = parallel.overlap_grad_reduce and stage.index == 0 and index == 0
        bucket = max(BUCKET_ELEMENTS, BUCKET_PER_RANK * layout.dp) if bucketed else None
        for expert, ranks in ((False, layout.dp), (True, layout.edp)):
            own = [size for size, is_expert in sizes if is_expert == expert]
            if own:
                distributed = parallel.use_distributed_optimizer
                buffers.append(make_buffer(own, ranks, expert=expert, distributed=distributed, bucket=bucket))
    return buffers


def states(
    config: Config,
    layout: Layout,
    stage: Stage,
    shapes: ModelShapes,
    storage: Storage,
    rank: tuple[int, int] | None = None,
) -> States:
    """Parameters, gradients and optimizer state of one rank of a stage.

    Args:
        rank: its places among the data-parallel ranks and among those of the experts; null: what no rank exceeds,
            which counts the buffer's padding (at most 63 elements per parameter, and the ends of buckets).
    """
    parts = [part for chunk in stage.chunks for part in shapes.parts(layout, chunk)]
    parameters = sum(size for part in parts for size, _ in part.sizes)
    matrices = sum(part.matrices for part in parts)
    buffers = stage_buffers(config, layout, stage, shapes)
    owned = sum(buffer.slice if rank is None else buffer.owned(rank[buffer.expert]) for buffer in buffers)
    return States(
        parameters=parameters,
        experts=sum(size for part in parts for size, expert in part.sizes if expert),
        owned=owned,
        weights=int((parameters - matrices) * storage.weight + matrices * (storage.matrix + storage.fp8_copy)),
        gradients=int(sum(buffer.numel for buffer in buffers) * storage.gradient),
        optimizer=int(owned * (storage.master + storage.moments)),
    )


def stage_memory(
    config: Config, layout: Layout, stage: Stage, held: States, storage: Storage, imbalance: float = 1.0
) -> StageMemory:
    """Memory of the fullest rank of a stage; `imbalance` is that of `Tokens.of`."""
    tokens = Tokens.of(config, layout, imbalance)
    microbatches = num_microbatches(config, layout.world)
    kept, back = 0.0, 0.0
    for index, chunk in enumerate(stage.chunks):
        bytes_kept, bytes_back = chunk_bytes(config, layout, tokens, storage, chunk)
        kept += bytes_kept * in_flight(layout, stage.index, index, microbatches)
        back = max(back, bytes_back)
    kinds = {is_moe_layer(config.model, layer) for chunk in stage.chunks for layer in chunk.layers}
    backward = back + max(backward_bytes(config, layout, tokens, storage, moe) for moe in kinds)
    transient = [backward]
    if any(chunk.head for chunk in stage.chunks):
        losses, loss = head_bytes(config, layout, tokens, storage)
        # While the last layers go back, the probabilities have gone; while the loss is computed, nothing goes back.
        transient.append(losses + loss)
    if storage.gradient < 4 and config.parallel.use_distributed_optimizer:
        transient.append(held.owned * 4)  # the step needs them in fp32
    return StageMemory(held.weights, held.gradients, held.optimizer, kept, max(transient))


def states_of(config: Config, layout: Layout, shapes: ModelShapes, storage: Storage) -> list[States]:
    """What the fullest rank of every stage holds between steps, in order."""
    return [states(config, layout, stage, shapes, storage) for stage in layout.stages]


def memory_of(
    config: Config, layout: Layout, held: Sequence[States], storage: Storage, imbalance: float = 1.0
) -> list[StageMemory]:
    """Memory of every stage, in order."""
    stages = zip(layout.stages, held, strict=True)
    return [stage_memory(config, layout, stage, own, storage, imbalance) for stage, own in stages]


def fullest(memory: Iterable[StageMemory]) -> tuple[int, StageMemory]:
    """The stage that needs the most, and its memory."""
    return max(enumerate(memory), key=lambda pair: pair[1].needed)
