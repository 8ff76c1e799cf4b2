"""Who holds what: the model chunks of every pipeline stage, the local shape of every parameter, the kinds of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ling.config.derived import data_parallel_size, expert_tensor_parallel_size
from ling.config.schema import Config, ModelConfig
from ling.model.counts import Shape, count_parameters, parameter_shapes


@dataclass(frozen=True)
class Chunk:
    """One model chunk: its decoder layers (0-based) and what else stands in it.

    `embedding` is also true for the copy that an MTP layer brings to the last stage.
    """

    layers: tuple[int, ...]
    embedding: bool
    head: bool
    mtp: bool


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: one chunk, or one for each virtual stage."""

    index: int
    chunks: tuple[Chunk, ...]

    @property
    def num_layers(self) -> int:
        """Decoder layers of the stage."""
        return sum(len(chunk.layers) for chunk in self.chunks)


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups of a run, and its stages. `edp` is the data parallelism of the experts."""

    world: int
    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    dp: int
    edp: int
    sequence_parallel: bool
    stages: tuple[Stage, ...]

    @property
    def token_split(self) -> int:
        """Ranks that share the tokens of a micro-batch outside the matrices."""
        return self.tp if self.sequence_parallel else 1

    def describe(self) -> str:
        """In words: `TP 1, PP 4, EP 8, DP 16`."""
        parts = [f"TP {self.tp}" + (" with SP" if self.sequence_parallel else ""), f"PP {self.pp}"]
        parts += [f"VPP {self.vpp}"] if self.vpp > 1 else []
        if self.ep > 1 or self.etp > 1:
            parts.append(f"EP {self.ep}" + (f", ETP {self.etp}" if self.etp > 1 else "") + f", expert DP {self.edp}")
        return ", ".join([*parts, f"DP {self.dp}"])


def make_layout(config: Config, world: int) -> Layout:
    """The layout of a config that `check_config` has passed for so many ranks."""
    parallel = config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    experts = config.model.num_moe_experts is not None
    etp = expert_tensor_parallel_size(parallel) if experts else 1
    ep = parallel.expert_model_parallel_size if experts else 1
    dp = data_parallel_size(parallel, world)
    return Layout(
        world=world,
        tp=parallel.tensor_model_parallel_size,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        dp=dp,
        edp=world // (etp * ep * pp),
        sequence_parallel=parallel.sequence_parallel,
        stages=_stages(config.model, pp, vpp, parallel.num_layers_per_stage),
    )


def _stages(model: ModelConfig, pp: int, vpp: int, counts: Sequence[int] | None) -> tuple[Stage, ...]:
    """Chunk c of the model stands on stage c mod PP; MTP layers, last norm and head in the last chunk."""
    number = pp * vpp
    counts = counts or [model.num_layers // number] * number
    chunks, first = [], 0
    for index, count in enumerate(counts):
        last = index == number - 1
        mtp = last and model.mtp_num_layers > 0
        chunks.append(Chunk(tuple(range(first, first + count)), embedding=index == 0 or mtp, head=last, mtp=mtp))
        first += count
    return tuple(Stage(stage, tuple(chunks[stage::pp])) for stage in range(pp))


_SPLIT_BY_ROW = tuple(
    f"{matrix}.weight" for matrix in ("word_embeddings", "output_layer", "linear_qkv", "linear_fc1", "eh_proj")
)


def local_shape(name: str, shape: Shape, layout: Layout) -> Shape:
    """The part of a parameter that one rank holds.

    Rows of embedding, head, query/key/value, fc1 and the MTP projection, columns of what follows them, are split over
    TP (ETP in the experts), experts over EP; the rest is whole everywhere.
    """
    tp = layout.tp
    if ".experts." in name:
        experts, rows, columns = shape
        if name.endswith("weight1"):
            return experts // layout.ep, rows // layout.etp, columns
        return experts // layout.ep, rows, columns // layout.etp
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return shape[0], shape[1] // tp
    if name.endswith(_SPLIT_BY_ROW):
        return shape[0] // tp, *shape[1:]
    return shape


def part_of(name: str) -> str:
    """The part of a model that a parameter stands in: a decoder layer's number, or one of four names."""
    if name.startswith("decoder.layers."):
        return name.split(".")[2]
    return {"embedding": "embedding", "decoder": "final_norm", "mtp": "mtp", "output_layer": "head"}[name.split(".")[0]]


@dataclass(frozen=True)
class LocalPart:
    """One rank's share of a part: shapes by global name, in the order of the module.

    sizes: elements of each parameter, and whether it is one of the experts that have data-parallel ranks of their own.
    matrices: elements to which low precision applies: the decoder's matrices, not embedding, head, router or norms.
    """

    shapes: dict[str, Shape]
    sizes: tuple[tuple[int, bool], ...]
    matrices: int


class ModelShapes:
    """A model's parameters by part, and what one rank holds of each; worked out once for many layouts."""

    def __init__(self, model: ModelConfig) -> None:
        self.counts = count_parameters(model)
        self._parts: dict[str, dict[str, Shape]] = {}
        for name, shape in parameter_shapes(model).items():
            self._parts.setdefault(part_of(name), {})[name] = shape
        self._local: dict[tuple[Any, ...], LocalPart] = {}

    def parts(self, layout: Layout, chunk: Chunk) -> list[LocalPart]:
        """The parts of a chunk, in the order of the built module."""
        names = ["embedding"] * chunk.embedding + [str(layer) for layer in chunk.layers]
        names += ["final_norm"] * chunk.head + ["mtp"] * chunk.mtp + ["head"] * chunk.head
        return [self._part(layout, name) for name in names]

    def chunk(self, layout: Layout, chunk: Chunk) -> dict[str, Shape]:
        """Global name and local shape of every parameter of a chunk."""
        return {name: shape for part in self.parts(layout, chunk) for name, shape in part.shapes.items()}

    def _part(self, layout: Layout, part: str) -> LocalPart:
        key = (part, layout.tp, layout.ep, layout.etp)
        if key not in self._local:
            shapes = {name: local_shape(name, shape, layout) for name, shape in self._parts[part].items()}
            sizes = tuple((math.prod(shape), layout.ep > 1 and ".experts." in name) for name, shape in shapes.items())
            matrices = sum(math.prod(shape) for name, shape in shapes.items() if _is_matrix(name, shape))
            self._local[key] = LocalPart(shapes, sizes, matrices)
        return self._local[key]


def _is_matrix(name: str, shape: Shape) -> bool:
    return len(shape) > 1 and not name.startswith(("embedding.", "output_layer.")) and ".router." not in name


@dataclass(frozen=True)
class RankKind:
    """Ranks that hold the same: a pipeline stage, and the shapes of its chunks. `ranks` are all of them."""

    stage: Stage
    shapes: tuple[dict[str, Shape], ...]
    ranks: range


def rank_kinds(config: Config, layout: Layout) -> Iterator[RankKind]:
    """The distinct ranks of the world.

    Two ranks differ where they hold other layers, another share of embedding, head and MTP layers, or other shapes.
    Matrices and experts divide evenly (the config check sees to it), so all ranks of a stage are of one kind; the
    stages of megatron-core's default order are blocks of consecutive ranks.
    """
    shapes = ModelShapes(config.model)
    block = layout.world // layout.pp
    for stage in layout.stages:
        parts = tuple(shapes.chunk(layout, chunk) for chunk in stage.chunks)
        yield RankKind(stage, parts, range(stage.index * block, (stage.index + 1) * block))


def balanced_layers(model: ModelConfig, chunks: int, extra: float) -> list[int]:
    """Decoder layers of each model chunk such that the last, which has `extra` layers' worth of work besides, and the
    others do about the same."""
    each = (model.num_layers + extra) / chunks
    last = max(1, round(each - extra))
    rest = model.num_layers - last
    base, more = divmod(rest, chunks - 1)
    return [base + (index < more) for index in range(chunks - 1)] + [last]
