"""Learnable scalars of activations where ranks share an FFN, a layer or the layers of the model.

A scalar is the same on all tensor-parallel ranks, but each sees only its part of the FFN (or, of routed experts, its
own tokens): the gradient is the sum over them. Over data parallelism megatron-core adds it up like any weight's. With
`learn: global` there is one tensor per FFN kind and model chunk, `activation_scalars.<kind>`; its gradient is the sum
over all chunks and pipeline stages too, so that the copies stay equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import make_sharded_tensor_for_checkpoint

from ling.activations.module import FFNActivation
from ling.config.schema import ModelConfig
from ling.model.counts import global_scalar_counts, is_moe_layer
from ling.parallel import groups


def activations(model: torch.nn.Module) -> Iterator[tuple[str, FFNActivation]]:
    """Every FFN's kind (`dense`, `shared`, `routed`) and its activation, in the order of the model."""
    for module in model.modules():
        activation = getattr(module, "activation", None)
        if isinstance(activation, FFNActivation):
            yield str(module.kind), activation


def share_global_scalars(chunk: Any) -> None:
    """Put one parameter per FFN kind in the place of the layers' own, where all layers are to learn the same."""
    chunk.activation_scalars = torch.nn.ParameterDict()
    chunk.num_global_scalars = global_scalar_counts(chunk.config.ling)
    for kind, activation in activations(chunk):
        if activation.learn != "global":
            continue
        if kind not in chunk.activation_scalars:
            chunk.activation_scalars[kind] = activation.scalars
            shared = chunk.activation_scalars[kind]
            # megatron-core's gradient norm leaves copies out; and a bucket of its own is split alike on all stages
            shared.shared = not _holds_first_layer(chunk, kind)
            shared.shared_embedding = True
        activation.use_scalars(chunk.activation_scalars[kind])


def _holds_first_layer(chunk: Any, kind: str) -> bool:
    """Whether a chunk has the first layer of the whole model with an FFN of this kind."""
    model: ModelConfig = chunk.config.ling
    first = next(layer for layer in range(model.num_layers) if is_moe_layer(model, layer) == (kind != "dense"))
    return any(layer.layer_number - 1 == first for layer in chunk.decoder.layers)


def sharded_global_scalars(chunk: Any, prefix: str) -> dict[str, ShardedTensor]:
    """megatron-core's description of `activation_scalars` in a checkpoint: one tensor per kind for the whole model."""
    described = {}
    for kind, scalars in chunk.activation_scalars.items():
        key = f"{prefix}activation_scalars.{kind}"
        replica = (int(scalars.shared), chunk.pg_collection.tp.rank(), groups.data_with_context().rank())
        described[key] = make_sharded_tensor_for_checkpoint(scalars, key, replica_id=replica)
    return described


@torch.no_grad()
def sum_scalar_gradients(chunks: list[Any]) -> None:
    """Complete the gradients of learnable scalars after megatron-core has reduced them over data parallelism."""
    tensor = groups.tensor()
    if tensor.size > 1:
        learning = [activation for chunk in chunks for _, activation in activations(chunk) if activation.learns]
        unique = {id(activation.scalars): _gradient(activation.scalars) for activation in learning}
        _all_reduce(list(unique.values()), tensor.group)
    _sum_over_layers(chunks)


def _sum_over_layers(chunks: list[Any]) -> None:
    pipeline = groups.pipeline()
    models = [next(part for part in chunk.modules() if hasattr(part, "activation_scalars")) for chunk in chunks]
    for kind, length in models[0].num_global_scalars.items():
        held = [_gradient(model.activation_scalars[kind]) for model in models if kind in model.activation_scalars]
        like = held[0] if held else _gradient(next(chunks[0].parameters()))
        total = sum(held, torch.zeros(length, dtype=like.dtype, device=like.device))
        if pipeline.size > 1:
            dist.all_reduce(total, group=pipeline.group)
        for gradient in held:
            gradient.copy_(total)


def _gradient(param: Any) -> torch.Tensor:
    gradient = getattr(param, "main_grad", None)
    return param.grad if gradient is None else gradient


def _all_reduce(tensors: list[torch.Tensor], group: Any) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
