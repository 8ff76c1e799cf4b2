"""Build every distinct rank of a world of any size, without memory for its weights, and hold it against the plan.

One process makes up the world: a process group whose collectives do nothing, and parameters on the meta device. Each
built rank runs the shapes of one forward pass, under uniform routing (`ling.plan.stand_ins`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ling.config.schema import Config
from ling.model import forward
from ling.model.build import build_model
from ling.model.counts import Shape
from ling.model.experts import GroupedExperts
from ling.model.init import global_names
from ling.parallel import groups
from ling.plan.activations import Storage, Tokens, chunk_bytes, head_bytes
from ling.plan.layout import Chunk, Layout, RankKind, make_layout, rank_kinds
from ling.plan.stand_ins import FlashShapes, grouped_shapes, use_uniform_routing

META = torch.device("meta")


@dataclass
class BuiltRank:
    """One kind of rank as it was built, beside what the plan says of it.

    activations: bytes that one forward pass of one micro-batch saves for the backward pass, losses included.
    problems: what differs; empty where the plan is right.
    """

    kind: RankKind
    parameters: int = 0
    expected_parameters: int = 0
    activations: int = 0
    expected_activations: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass
class Verification:
    """All kinds of ranks of a world."""

    world: int
    ranks: list[BuiltRank]
    seconds: float

    @property
    def problems(self) -> list[str]:
        """What differs, with the rank that it was seen on."""
        return [f"rank {row.kind.ranks[0]}: {text}" for row in self.ranks for text in row.problems]


def verify(config: Config, world: int, operations: Mapping[str, str]) -> Verification:
    """Build one rank of each kind, and compare names, shapes and saved activations with the plan.

    Args:
        config: one that the config check has passed for this world.
        operations: implementation of each operation, by `ling.platform.select.choose`; the platform must be started.
    """
    started = time.monotonic()
    layout = make_layout(config, world)
    rows = [_build(config, layout, kind, operations) for kind in rank_kinds(config, layout)]
    return Verification(world, rows, time.monotonic() - started)


@contextmanager
def made_up_world(config: Config, rank: int, world: int) -> Iterator[None]:
    """Be a rank of a world that does not exist: collectives return at once, tensors keep their shapes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        groups.build_groups(config.parallel)
        groups.seed_random_states(config.run.seed)
        yield
    finally:
        groups.disconnect()
        forward.MTPLossLoggingHelper.tracker.clear()  # megatron-core's tally of the process, with tensors of this world


def _build(config: Config, layout: Layout, kind: RankKind, operations: Mapping[str, str]) -> BuiltRank:
    built = BuiltRank(kind)
    with made_up_world(config, kind.ranks[0], layout.world):
        chunks = build_model(config, META, bf16=config.precision.recipe != "fp32", operations=operations)
        if len(chunks) != len(kind.shapes):
            built.problems.append(f"{len(chunks)} model chunks, expected {len(kind.shapes)}")
        for chunk, shapes, described in zip(chunks, kind.shapes, kind.stage.chunks, strict=False):
            _compare(built, chunk, shapes)
            if not built.problems:
                _forward(built, config, layout, chunk, described)
    return built


def _compare(built: BuiltRank, chunk: Any, expected: dict[str, Shape]) -> None:
    names = global_names(chunk)
    shapes = {names[name]: tuple(param.shape) for name, param in chunk.named_parameters()}
    built.parameters += sum(param.numel() for param in chunk.parameters())
    built.expected_parameters += sum(torch.Size(shape).numel() for shape in expected.values())
    scalars = {name for name in shapes if ".activation." in name}  # an activation's own few, which no plan counts
    for name in (shapes.keys() - scalars) ^ expected.keys():
        built.problems.append(f"{name}: {'not planned' if name in shapes else 'planned, but not built'}")
    for name in shapes.keys() & expected.keys():
        if shapes[name] != tuple(expected[name]):
            built.problems.append(f"{name}: built as {shapes[name]}, planned as {tuple(expected[name])}")


def _forward(built: BuiltRank, config: Config, layout: Layout, chunk: Any, described: Chunk) -> None:
    """The shapes of one forward pass of a chunk, and the bytes that it saves."""
    train, length = config.train, config.data.sequence_length
    _prepare(chunk, layout)
    tokens = torch.empty(train.micro_batch_size, length, dtype=torch.int64, device=META)
    hidden = (length // layout.token_split, train.micro_batch_size, config.model.hidden_size)
    if not chunk.pre_process:
        dtype = torch.float32 if config.precision.recipe == "fp32" else torch.bfloat16
        chunk.set_input_tensor(torch.empty(hidden, dtype=dtype, device=META, requires_grad=True))
    # megatron-core makes the results of its collectives on the current device.
    with saved_bytes(chunk) as saved, mock.patch.object(torch.cuda, "current_device", return_value=META):
        output = chunk(tokens, tokens, None, labels=tokens, loss_mask=tokens)
    wanted = (train.micro_batch_size, length) if described.head else hidden
    if tuple(output.shape) != wanted:
        built.problems.append(f"the output of layers {described.layers} is {tuple(output.shape)}, expected {wanted}")
    storage, counted = Storage.of(config), Tokens.of(config, layout)
    built.activations += saved.total
    built.expected_activations += chunk_bytes(config, layout, counted, storage, described)[0]
    if described.head:
        built.expected_activations += head_bytes(config, layout, counted, storage)[0]


def _prepare(chunk: Any, layout: Layout) -> None:
    """Put shape-only stand-ins where a module reads values, or has a kernel for GPUs only."""
    chunk.train()
    use_uniform_routing(chunk, layout.etp)
    for module in chunk.modules():
        if getattr(module, "inv_freq", None) is not None:
            module.inv_freq = module.inv_freq.to(META)
        if hasattr(module, "core_attention"):
            module.core_attention = FlashShapes()
        if isinstance(module, GroupedExperts):
            module.linear = grouped_shapes


class SavedBytes:
    """Counts what autograd saves: each storage once, parameters and buffers not."""

    def __init__(self, module: torch.nn.Module) -> None:
        held = [*module.parameters(), *module.buffers()]
        self._module = {tensor.untyped_storage()._cdata for tensor in held}
        self._saved: dict[int, torch.UntypedStorage] = {}  # alive, so that their addresses stay their own

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """autograd's hook: note the tensor, keep it."""
        storage = tensor.untyped_storage()
        if tensor.device == META and storage._cdata not in self._module and not self._is_weight_copy(tensor):
            self._saved[storage._cdata] = storage
        return tensor

    @property
    def total(self) -> int:
        """Bytes; what recomputation has given up since counts no more."""
        return sum(storage.nbytes() for storage in self._saved.values())

    def _is_weight_copy(self, tensor: torch.Tensor) -> bool:
        """The router's fp32 copy of its weight."""
        return tensor.dim() == 2 and not tensor.is_contiguous()


@contextmanager
def saved_bytes(module: torch.nn.Module) -> Iterator[SavedBytes]:
    """Count what is saved inside."""
    counter = SavedBytes(module)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        yield counter
