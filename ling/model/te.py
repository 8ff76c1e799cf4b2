"""Transformer Engine's layers in the Ling decoder's slots; imported only where `ling.platform.select` chose them."""

# T: tokens sent to this rank's experts, sorted by expert; P: the same, padded; E: experts of this rank; H: hidden size

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.transformer.moe.experts import TEGroupedMLP

from ling.model.experts import sharded_scalars
from ling.model.linears import Linears
from ling.model.mlp import activate_and_project, build_activation, config_for, set_activation_layer

LINEARS = Linears(
    column=TEColumnParallelLinear, row=TERowParallelLinear, norm_and_column=TELayerNormColumnParallelLinear
)


class TEGroupedExperts(TEGroupedMLP):
    """The experts of one layer that live on this rank, in Transformer Engine's grouped linear layers.

    Each expert has parameters of its own: `linear_fc1.weight0` … `[2F, H]`, `linear_fc2.weight0` … `[H, F]`. In a
    checkpoint they stand under the same names and global shapes as those of `GroupedExperts`.
    """

    kind = "routed"

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(
            num_local_experts,
            config_for(config, "routed", config.ling.moe_ffn_hidden_size),
            SimpleNamespace(
                linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear, activation_func=None
            ),
            pg_collection=pg_collection,
        )
        self.activation = build_activation(config, self.kind, self.tp_group)
        self.scalars_group = pg_collection.tp
        for _, _, _, weight, dim in self.expert_weights():
            # Without its own communication Transformer Engine marks them as not split, and ranks would be left out of
            # the gradient norm.
            stride = 2 if dim == 0 and self.config.gated_linear_unit else 1
            marks = {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": stride}
            for mark, value in marks.items():
                setattr(weight, mark, value)

    def expert_weights(self) -> Iterator[tuple[str, str, int, torch.nn.Parameter, int]]:
        """As `GroupedExperts.expert_weights`."""
        for linear, kind, dim in (("linear_fc1", "weight1", 0), ("linear_fc2", "weight2", 1)):
            for index in range(self.num_local_experts):
                name = f"{linear}.weight{index}"
                yield name, kind, index, self.get_parameter(name), dim

    def set_layer_number(self, layer_number: int) -> None:
        """Which layer this is (1-based, MTP layers after the others)."""
        set_activation_layer(self.activation, self.config.ling, layer_number)

    def forward(  # type: ignore[override]
        self, x_TH: torch.Tensor, tokens_per_expert: torch.Tensor, weight_T: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """As `GroupedExperts.forward`; in FP8 each expert's rows are padded to what its matrix products need."""
        tokens: list[int] = tokens_per_expert.tolist()
        if not self.config.fp8:
            return self._through_experts(x_TH, tokens, weight_T), None
        x_PH, padded = self.quantization_padding(x_TH, tokens)
        weight_P1, _ = self.quantization_padding(weight_T.unsqueeze(-1), tokens)
        return self.quantization_unpadding(self._through_experts(x_PH, padded, weight_P1.squeeze(-1)), tokens), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of this rank's part of the checkpointed tensors."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        weights = {key: value for key, value in state.items() if not key.startswith(f"{prefix}activation.")}
        return weights | sharded_scalars(self, prefix, sharded_offsets, metadata)

    def _through_experts(self, x_TH: torch.Tensor, tokens: list[int], weight_T: torch.Tensor) -> torch.Tensor:
        def down(activated: torch.Tensor) -> torch.Tensor:
            return self.linear_fc2(activated, tokens)[0]

        return activate_and_project(self.config, self.activation, down, self.linear_fc1(x_TH, tokens)[0], weight_T)
