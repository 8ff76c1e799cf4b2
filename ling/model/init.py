"""Initial weights that do not depend on the layout: each tensor is drawn whole from a seed of its own, then sliced.

A tensor's random stream is seeded by the run's seed and its global name (layers numbered over the whole model, experts
over all ranks), so a rank needs to know nothing of what the others draw.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_layer import TransformerLayer

from ling.config.schema import ModelConfig
from ling.model.mlp import DenseMLP

OUTPUT_LAYERS = ("linear_proj.weight", "linear_fc2.weight", "experts.weight2")
"""Endings of the names of matrices that write to the residual stream."""

_BLOCK_ELEMENTS = 1 << 24  # tensors are drawn in blocks of about so many numbers, which bounds the memory


def mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Set the attributes by which megatron-core knows how a parameter is split over the tensor-parallel ranks.

    Its gradient norm reads them. megatron-core 0.16 sets them only in its own initialisation, which is not used here.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None or hasattr(weight, "tensor_model_parallel"):
            continue
        if isinstance(module, (VocabParallelEmbedding, ColumnParallelLinear)):
            set_tensor_model_parallel_attributes(weight, True, 0, 1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(weight, True, 1, 1)
    for module in model.modules():
        if isinstance(module, DenseMLP) and module.config.gated_linear_unit:
            module.linear_fc1.weight.partition_stride = 2  # gate and up are split each on its own


def global_names(model: torch.nn.Module) -> dict[str, str]:
    """Global name of each local parameter name, the same on every layout and with every megatron-core.

    Pipeline stages number their layers from 0, the model does not; 0.19 renamed the layer inside an MTP layer.
    """
    offsets = {
        name: module.layer_number - 1
        for name, module in model.named_modules()
        if isinstance(module, TransformerLayer) and name.startswith("decoder.layers.")
    }
    names = {}
    for name, _ in model.named_parameters():
        match = re.match(r"decoder\.layers\.\d+", name)
        global_name = f"decoder.layers.{offsets[match[0]]}{name[match.end() :]}" if match else name
        names[name] = global_name.replace(".mtp_model_layer.", ".transformer_layer.")
    return names


@torch.no_grad()
def initialize(model: torch.nn.Module, model_config: ModelConfig, seed: int) -> None:
    """Draw all weights of a model chunk: normal with std 0.02 (Ling 2.0), norms 1.

    With `output_init: scaled`, the matrices that write to the residual stream get std / sqrt(2 · num_layers) (GPT-2).
    """
    names = global_names(model)
    experts = _draw_experts(model, names, model_config, seed)
    for name, param in model.named_parameters():
        if name in experts or param.dim() <= 1:  # norms: 1 from the start; an activation's scalars have their values
            continue
        group = _tensor_group(model, name)
        part = _Part(group.rank(), group.size(), getattr(param, "partition_dim", -1), param)
        _draw(param, part, _std(model_config, name), _seed(seed, names[name]))


def _draw_experts(model: torch.nn.Module, names: dict[str, str], model_config: ModelConfig, seed: int) -> set[str]:
    """Draw the routed experts one by one; the names of their parameters, whichever class holds them."""
    drawn = set()
    for prefix, module in model.named_modules():
        if not hasattr(module, "expert_weights"):
            continue
        experts: Any = module
        first = experts.ep_group.rank() * experts.num_local_experts
        for name, kind, index, matrix, dim in experts.expert_weights():
            param = experts.get_parameter(name)
            part = _Part(experts.tp_group.rank(), experts.tp_group.size(), dim, param)
            layer = names[f"{prefix}.{name}"].removesuffix(name)
            _draw(matrix, part, _std(model_config, f"experts.{kind}"), _seed(seed, f"{layer}{kind}.{first + index}"))
            drawn.add(f"{prefix}.{name}")
    return drawn


def _std(model_config: ModelConfig, name: str) -> float:
    scaled = model_config.output_init == "scaled" and name.endswith(OUTPUT_LAYERS)
    return model_config.init_method_std / (math.sqrt(2 * model_config.num_layers) if scaled else 1.0)


class _Part:
    """Which part of a whole tensor this rank holds."""

    def __init__(self, rank: int, size: int, dim: int, param: Any) -> None:
        split = bool(getattr(param, "tensor_model_parallel", False)) and size > 1
        self.rank, self.size, self.dim = (rank, size, dim) if split else (0, 1, 0)
        self.stride = getattr(param, "partition_stride", 1)

    def pieces(self, length: int) -> Iterator[tuple[int, int, int]]:
        """`(start in the whole, start in the part, length)` along the split dimension; `length` is the part's."""
        piece = length // self.stride
        for index in range(self.stride):
            yield (index * self.size + self.rank) * piece, index * piece, piece


def _draw(tensor: torch.Tensor, part: _Part, std: float, seed: int) -> None:
    """Fill a 2-D tensor with its slice of the whole, drawn row block by row block."""
    shape = list(tensor.shape)
    shape[part.dim] *= part.size
    rows, columns = shape
    generator = torch.Generator(device=tensor.device).manual_seed(seed)
    block_rows = max(1, _BLOCK_ELEMENTS // columns)
    for first in range(0, rows, block_rows):
        last = min(first + block_rows, rows)
        block = torch.empty(last - first, columns, dtype=torch.float32, device=tensor.device)
        block.normal_(0.0, std, generator=generator)
        for start, own, length in part.pieces(tensor.shape[part.dim]):
            if part.dim == 1:
                tensor[first:last, own : own + length] = block[:, start : start + length]
            else:
                low, high = max(start, first), min(start + length, last)
                if low < high:
                    tensor[own + low - start : own + high - start] = block[low - first : high - first]


def _tensor_group(model: torch.nn.Module, name: str) -> Any:
    """The tensor-parallel group of the module that owns a parameter, else of the model."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return getattr(owner, "tp_group", None) or model.pg_collection.tp  # type: ignore[union-attr]


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
