"""Which tensor of a Hugging Face model directory is which part of which tensor of a checkpoint: the one table of names.

Export, import and verification all follow it. A tensor of a model directory is always made of whole rows of one tensor
of a checkpoint, so a row of the table says: the name here, the name there, and how the rows are split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ling.activations.table import resolve
from ling.config.derived import activation_for, kv_channels, num_query_groups
from ling.config.schema import ModelConfig
from ling.model.counts import is_moe_layer, parameter_shapes

Shape = tuple[int, ...]
Rows = tuple[tuple[int, int], ...]

_WHOLE, _QKV, _GATE_UP = "whole", "qkv", "gate_up"


class _Row(NamedTuple):
    theirs: str
    """Name there; `{expert}` and `{proj}` stand for each expert, and for gate and up."""
    split: str = _WHOLE
    kind: str = "dense"
    """Kind of FFN, whose activation says whether there is a gate."""


_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.word_embeddings.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm.weight": _Row("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": _Row("attention.query_key_value.weight", _QKV),
    "self_attention.linear_proj.weight": _Row("attention.dense.weight"),
    "self_attention.q_layernorm.weight": _Row("attention.query_layernorm.weight"),
    "self_attention.k_layernorm.weight": _Row("attention.key_layernorm.weight"),
    "pre_mlp_layernorm.weight": _Row("post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": _Row("mlp.{proj}_proj.weight", _GATE_UP, "dense"),
    "mlp.linear_fc2.weight": _Row("mlp.down_proj.weight"),
    "mlp.activation.scalars": _Row("mlp.act_fn.scalars"),
    "mlp.router.weight": _Row("mlp.gate.weight"),
    "mlp.router.expert_bias": _Row("mlp.gate.expert_bias"),
    "mlp.experts.weight1": _Row("mlp.experts.{expert}.{proj}_proj.weight", _GATE_UP, "routed"),
    "mlp.experts.weight2": _Row("mlp.experts.{expert}.down_proj.weight"),
    "mlp.experts.activation.scalars": _Row("mlp.act_fn.scalars"),
    "mlp.shared_experts.linear_fc1.weight": _Row("mlp.shared_experts.{proj}_proj.weight", _GATE_UP, "shared"),
    "mlp.shared_experts.linear_fc2.weight": _Row("mlp.shared_experts.down_proj.weight"),
    "mlp.shared_experts.activation.scalars": _Row("mlp.shared_experts.act_fn.scalars"),
}
_MTP = {name: name for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight")}

SHARED_SCALARS = "activation_scalars."
"""Begins the checkpoint's names of scalars that all layers learn together; the kind of FFN follows."""


@dataclass(frozen=True)
class Piece:
    """A tensor of a model directory, and where its rows stand in a checkpoint.

    name, shape: there.
    source: the checkpoint's tensor.
    index: into the first dimension of the source, which stacks experts or layers; None where it does neither.
    rows: ranges of rows of the source (at that index), which one after the other make the tensor.
    """

    name: str
    shape: Shape
    source: str
    index: int | None
    rows: Rows


class Place(NamedTuple):
    """A parameter of the model in a checkpoint: the tensor, and with stacked layers the index of this one."""

    key: str
    layer: int | None


def stacks_layers(model: ModelConfig) -> bool:
    """Whether megatron-core stores equal layers as one tensor, with the layer as its first dimension."""
    return model.num_moe_experts is None


def place_of(name: str, stacked: bool) -> Place:
    """Where a checkpoint has a parameter of the model; experts stand there under megatron-core's names."""
    for ours, stored in (("weight1", "linear_fc1"), ("weight2", "linear_fc2")):
        name = name.replace(f".mlp.experts.{ours}", f".mlp.experts.experts.{stored}.weight")
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name) if stacked else None
    return Place(f"decoder.layers.{match[2]}", int(match[1])) if match else Place(name, None)


def checkpoint_shapes(model: ModelConfig, stacked: bool | None = None) -> dict[str, Shape]:
    """Name and shape of every tensor of the model in a checkpoint, in the order of the layers.

    Args:
        stacked: whether equal layers are one tensor; null: as megatron-core stores this model.
    """
    stacked = stacks_layers(model) if stacked is None else stacked
    shapes = {}
    for name, shape in _model_shapes(model).items():
        key, layer = place_of(name, stacked)
        shapes[key] = shape if layer is None else (model.num_layers, *shape)
    return shapes


def _model_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The parameters and the routers' biases."""
    shapes = {}
    for name, shape in parameter_shapes(model).items():
        shapes[name] = shape
        if name.endswith(".router.weight") and model.moe_router_enable_expert_bias:
            shapes[name.removesuffix("weight") + "expert_bias"] = shape[:1]
    return shapes


def keeps_fp32(name: str) -> bool:
    """Whether a tensor, by its name here or there, is fp32 whatever the rest is."""
    return name.endswith((".expert_bias", ".scalars")) or name.startswith(SHARED_SCALARS)


def canonical(stored: str) -> str:
    """A checkpoint's name as this table has it: megatron-core 0.19 renamed the layer inside an MTP layer."""
    return stored.replace(".mtp_model_layer.", ".transformer_layer.")


def pieces(model: ModelConfig, stacked: bool | None = None) -> Iterator[Piece]:
    """Every tensor of the model directory of a model, layer by layer; `stacked` as in `checkpoint_shapes`."""
    stacked = stacks_layers(model) if stacked is None else stacked
    for name, shape in _model_shapes(model).items():
        key, layer = place_of(name, stacked)
        for piece in _pieces_of(model, name, shape):
            yield replace(piece, source=key, index=piece.index if layer is None else layer)


def _pieces_of(model: ModelConfig, name: str, shape: Shape) -> Iterator[Piece]:
    if name.startswith(SHARED_SCALARS):
        for there in _scalars_of(model, name.removeprefix(SHARED_SCALARS)):
            yield Piece(there, shape, name, None, ((0, shape[0]),))
        return
    row = _row(model, name)
    stacked = "{expert}" in row.theirs
    inner = shape[1:] if stacked else shape
    parts: list[tuple[str, Rows]] = [("", ((0, inner[0]),))]
    if row.split == _QKV:
        parts = [("", tuple(_qkv_rows(model)))]
    elif row.split == _GATE_UP:
        parts = _gate_and_up(model, row.kind, inner[0])
    for expert in range(shape[0]) if stacked else (None,):
        for proj, rows in parts:
            there = row.theirs.replace("{expert}", str(expert)).replace("{proj}", proj)
            length = sum(stop - start for start, stop in rows)
            yield Piece(there, (length, *inner[1:]), name, expert, rows)


def _row(model: ModelConfig, name: str) -> _Row:
    """The table's row of a parameter, with the layer's number in it."""
    if name in _OUTSIDE:
        return _Row(_OUTSIDE[name])
    match = re.fullmatch(r"(decoder|mtp)\.layers\.(\d+)\.(transformer_layer\.)?(.+)", name)
    assert match is not None, f"the table of names lacks {name}"
    inside_mtp = match[1] == "mtp" and match[3] is None
    layer = int(match[2]) + (model.num_layers if match[1] == "mtp" else 0)
    row = _Row(_MTP[match[4]]) if inside_mtp else _LAYER[match[4]]
    return row._replace(theirs=f"model.layers.{layer}.{row.theirs}")


def _scalars_of(model: ModelConfig, kind: str) -> Iterator[str]:
    """Names of what the FFNs of a kind learn together: there, each layer has a copy."""
    part = {"dense": "mlp.", "routed": "mlp.", "shared": "mlp.shared_experts."}[kind]
    for layer in range(model.num_layers + model.mtp_num_layers):
        if is_moe_layer(model, min(layer, model.num_layers - 1)) == (kind != "dense"):
            yield f"model.layers.{layer}.{part}act_fn.scalars"


def _qkv_rows(model: ModelConfig) -> Iterator[tuple[int, int]]:
    """All queries, all keys, all values, from rows that stand per group: q .. q k v."""
    head, groups = kv_channels(model), num_query_groups(model)
    queries = model.num_attention_heads // groups * head
    group = queries + 2 * head
    for first, length in ((0, queries), (queries, head), (queries + head, head)):
        yield from ((g * group + first, g * group + first + length) for g in range(groups))


def _gate_and_up(model: ModelConfig, kind: str, rows: int) -> list[tuple[str, Rows]]:
    if resolve(activation_for(model, kind)).activation.gated:
        return [("gate", ((0, rows // 2),)), ("up", ((rows // 2, rows),))]
    return [("up", ((0, rows),))]


class Segment(NamedTuple):
    """Rows `start` to `stop` of a source (of one expert of it) that are the rows from `row` on of a piece."""

    piece: Piece
    start: int
    stop: int
    row: int

    def view(self, slab: Any, first: int) -> Any:
        """These rows in a slab of the source, which begins at index `first` of the source's first dimension."""
        if self.piece.index is None:
            return slab[self.start - first : self.stop - first]
        return slab[self.piece.index - first, self.start : self.stop]


def segments(pieces_of_source: Iterable[Piece], first: int, last: int) -> Iterator[Segment]:
    """What of the pieces stands between two indices of their source's first dimension."""
    for piece in pieces_of_source:
        if piece.index is not None and not first <= piece.index < last:
            continue
        row = 0
        for start, stop in piece.rows:
            low, high = (start, stop) if piece.index is not None else (max(start, first), min(stop, last))
            if low < high:
                yield Segment(piece, low, high, row + low - start)
            row += stop - start


def by_source(all_pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """The pieces of each tensor of the checkpoint."""
    found: dict[str, list[Piece]] = {}
    for piece in all_pieces:
        found.setdefault(piece.source, []).append(piece)
    return found
