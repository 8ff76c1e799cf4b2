"""The FFNs that every token passes: the dense one of the first layers, and the shared experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP, MLPSubmodules, apply_swiglu_sharded_factory
from megatron.core.transformer.utils import sharded_state_dict_default

from ling.activations.module import FFNActivation
from ling.activations.table import ResolvedActivation, resolve
from ling.config.derived import activation_for
from ling.config.schema import ModelConfig
from ling.model.linears import Linears, linears
from ling.model.rows import ShardedRows


def resolved_activation(model: ModelConfig, kind: str) -> ResolvedActivation:
    """The activation of an FFN kind: `dense`, `shared` or `routed`."""
    return resolve(activation_for(model, kind), f"model.{kind}_activation", model.num_layers)


def build_activation(config: Any, kind: str, tp_group: Any) -> FFNActivation:
    """The activation of an FFN kind, where the ranks of `tp_group` share the FFN's width."""
    activation = FFNActivation(resolved_activation(config.ling, kind), config.operations["activation"])
    if tp_group is not None and tp_group.size() > 1:
        activation.rows = ShardedRows(tp_group)
    return activation


def set_activation_layer(activation: FFNActivation, model: ModelConfig, layer_number: int) -> None:
    """Tell an activation its layer, 1-based; MTP layers come after the decoder's and are like its last one."""
    activation.set_layer(min(layer_number, model.num_layers) - 1)


def activate_and_project(
    config: Any,
    activation: FFNActivation,
    project: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """`project(activation(hidden, weight))`; with `recompute_activation` the activation's output is not kept in between
    but computed again just before the backward pass of the projection, which reads it."""
    if not (config.recompute_activation and hidden.requires_grad and hidden.numel()):
        return project(activation(hidden, weight))
    checkpoint = CheckpointWithoutOutput()
    output = project(checkpoint.checkpoint(activation, hidden, weight))
    checkpoint.discard_output_and_register_recompute(output)
    return output


def config_for(config: Any, kind: str, ffn_hidden_size: int) -> Any:
    """A copy of the TransformerConfig as one FFN kind sees it: its own width, its own gatedness."""
    config = copy.copy(config)
    config.ffn_hidden_size = ffn_hidden_size
    config.gated_linear_unit = resolved_activation(config.ling, kind).activation.gated
    return config


class DenseMLP(MLP):
    """down(activation(up and gate projection)), its matrices split over the tensor-parallel ranks."""

    kind = "dense"

    def __init__(self, config: Any, tp_group: Any = None, pg_collection: Any = None, **kwargs: Any) -> None:
        width = self.width(config.ling)
        super().__init__(
            config=config_for(config, self.kind, width),
            submodules=MLPSubmodules(linear_fc1=self.first_linear(linears(config)), linear_fc2=linears(config).row),
            ffn_hidden_size=width,
            tp_group=tp_group if tp_group is not None else getattr(pg_collection, "tp", None),
        )
        self.activation = build_activation(config, self.kind, self.tp_group)

    def width(self, model: ModelConfig) -> int:
        """Width of the FFN, before it is split over ranks."""
        return model.ffn_hidden_size

    def first_linear(self, backend: Linears) -> type:
        """Class of the up and gate projection: with the norm before it, where the backend has that in one."""
        return backend.norm_and_column or backend.column

    def set_layer_number(self, layer_number: int) -> None:
        """megatron-core says which layer this is (1-based, MTP layers after the others)."""
        set_activation_layer(self.activation, self.config.ling, layer_number)

    def forward(self, hidden_states: torch.Tensor, per_token_scale: Any = None, **kwargs: Any) -> tuple[Any, None]:
        """`[S, B, hidden]` to the same shape, and no bias."""

        def down(activated: torch.Tensor) -> torch.Tensor:
            return self.linear_fc2(activated)[0]

        projected, _ = self.linear_fc1(hidden_states)
        return activate_and_project(self.config, self.activation, down, projected, per_token_scale), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of this rank's part of the checkpointed tensors; gate and up split apart."""
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            part = sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
            if name == "linear_fc1" and self.config.gated_linear_unit:
                key = f"{prefix}{name}.weight"
                part[key] = apply_swiglu_sharded_factory(part[key], sharded_offsets)
            state |= part
        return state


class SharedExperts(DenseMLP):
    """The experts that every token passes, as one FFN of their joint width."""

    kind = "shared"

    def width(self, model: ModelConfig) -> int:
        """Width of all shared experts together."""
        assert model.moe_shared_expert_intermediate_size is not None
        return model.moe_shared_expert_intermediate_size

    def first_linear(self, backend: Linears) -> type:
        """Class of the up and gate projection; the norm before it is the router's and the routed experts' too."""
        return backend.column

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """`[S, B, hidden]` to the same shape; megatron-core's MoELayer adds it to the routed experts' output."""
        return super().forward(hidden_states)[0]
