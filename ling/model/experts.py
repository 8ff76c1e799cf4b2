"""The routed experts of one rank, as grouped matrix products."""

# T: tokens sent to this rank's experts, sorted by expert; P: the same, padded; E: experts of this rank; H: hidden size;
# F: width of an expert

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.utils import sharded_state_dict_default

from ling.model.mlp import SharedExperts, activate_and_project, build_activation, config_for, set_activation_layer
from ling.model.router import LingRouter

CPU_ROW_MULTIPLE = 64


def grouped_linear(x_TK: torch.Tensor, weight_ENK: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """`x @ weight[e].T` for the rows of each expert, `[T, N]`, in one call of torch's grouped_mm."""
    if x_TK.shape[0] == 0:  # keeps the weights in the graph: their gradient is zero, not missing
        return F.linear(x_TK, weight_ENK[0])
    ends_E = tokens_per_expert.cumsum(0).to(device=x_TK.device, dtype=torch.int32)
    return F.grouped_mm(x_TK, weight_ENK.transpose(1, 2), offs=ends_E)


def looped_linear(x_TK: torch.Tensor, weight_ENK: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """As `grouped_linear`, one product per expert."""
    rows = x_TK.split(tokens_per_expert.tolist())
    return torch.cat([F.linear(x, weight) for x, weight in zip(rows, weight_ENK.unbind(0), strict=True)])


def aligned_rows(tokens_per_expert: torch.Tensor, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row goes when every expert's rows are padded to a multiple.

    Args:
        tokens_per_expert: `[E]`, on the host.

    Returns:
        `[T]` new row of each row, and `[E]` padded rows of each expert.
    """
    padded_E = (tokens_per_expert + multiple - 1) // multiple * multiple
    shift_E = (padded_E.cumsum(0) - padded_E) - (tokens_per_expert.cumsum(0) - tokens_per_expert)
    rows_T = torch.arange(int(tokens_per_expert.sum())) + shift_E.repeat_interleave(tokens_per_expert)
    return rows_T, padded_E


class GroupedExperts(MegatronModule):
    """The experts of one layer that live on this rank.

    `weight1` is `[E, 2F, H]` (gate ‖ up; `[E, F, H]` un-gated), `weight2` is `[E, H, F]`. In a checkpoint they stand
    under the names and global shapes of megatron-core's SequentialMLP and TEGroupedMLP, however they are multiplied.
    """

    kind = "routed"

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        width = config.ling.moe_ffn_hidden_size
        super().__init__(config=config_for(config, "routed", width))
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.gated = self.config.gated_linear_unit
        self.activation = build_activation(config, self.kind, self.tp_group)
        self.scalars_group = pg_collection.tp
        self.linear = grouped_linear if config.operations["experts"] == "grouped_mm" else looped_linear
        local_width, hidden, dtype = width // self.tp_group.size(), config.hidden_size, config.params_dtype
        fc1_rows = local_width * (2 if self.gated else 1)
        self.weight1 = torch.nn.Parameter(torch.empty(num_local_experts, fc1_rows, hidden, dtype=dtype))
        self.weight2 = torch.nn.Parameter(torch.empty(num_local_experts, hidden, local_width, dtype=dtype))
        set_tensor_model_parallel_attributes(self.weight1, True, 1, 2 if self.gated else 1)
        set_tensor_model_parallel_attributes(self.weight2, True, 2, 1)
        for weight in (self.weight1, self.weight2):
            # megatron-core reduces parameters with this mark over the expert-data-parallel ranks.
            weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]

    def expert_weights(self) -> Iterator[tuple[str, str, int, torch.Tensor, int]]:
        """Each matrix of each expert.

        Yields:
            Name of its parameter in this module, `weight1` (up and gate) or `weight2` (down), number of the expert on
            this rank, the matrix, and its dimension that is split over the expert-tensor-parallel ranks.
        """
        for kind, dim in (("weight1", 0), ("weight2", 1)):
            for index, matrix in enumerate(self.get_parameter(kind).unbind(0)):
                yield kind, kind, index, matrix, dim

    def set_layer_number(self, layer_number: int) -> None:
        """Which layer this is (1-based, MTP layers after the others)."""
        set_activation_layer(self.activation, self.config.ling, layer_number)

    def forward(
        self, x_TH: torch.Tensor, tokens_per_expert: torch.Tensor, weight_T: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Each row through its expert, times its routing weight.

        Args:
            x_TH: `[T, H]`, sorted by expert.
            tokens_per_expert: `[E]`, rows of each expert; their sum is T.
            weight_T: `[T]`, routing weights; multiplied inside the activation.

        Returns:
            `[T, H]`, and no bias.
        """
        if x_TH.shape[0] == 0 or x_TH.device.type != "cpu":
            return self._through_experts(x_TH, tokens_per_expert, weight_T), None
        # oneDNN compiles a kernel for each new number of rows, at milliseconds apiece: let there be few such numbers.
        rows_T, padded_E = aligned_rows(tokens_per_expert, CPU_ROW_MULTIPLE)
        total = int(padded_E.sum())
        x_PH = x_TH.new_zeros(total, x_TH.shape[1]).index_copy(0, rows_T, x_TH)
        weight_P = weight_T.new_zeros(total).index_copy(0, rows_T, weight_T)
        return self._through_experts(x_PH, padded_E, weight_P).index_select(0, rows_T), None

    def _through_experts(
        self, x_TH: torch.Tensor, tokens_per_expert: torch.Tensor, weight_T: torch.Tensor
    ) -> torch.Tensor:
        def down(activated: torch.Tensor) -> torch.Tensor:
            return self.linear(activated, self.weight2, tokens_per_expert)

        hidden = self.linear(x_TH, self.weight1, tokens_per_expert)
        return activate_and_project(self.config, self.activation, down, hidden, weight_T)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of this rank's part of the checkpointed tensors."""
        axis = len(sharded_offsets)  # tensors of equal layers may be stacked along axes in front
        expert_offset = (axis, self.ep_group.rank(), self.ep_group.size())
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        replica_id = (0, 0, self.dp_group.rank())

        def shard(key: str, tensor: torch.Tensor, dim: int, part: int, parts: int, replica: Any) -> ShardedTensor:
            offsets = (*sharded_offsets, expert_offset, (axis + dim, part, parts))
            return ShardedTensor.from_rank_offsets(
                key, tensor.contiguous(), *offsets, replica_id=replica, prepend_axis_num=axis
            )

        def split(key: str, tensor: torch.Tensor, replica: Any, flattened_range: Any = None) -> list[ShardedTensor]:
            gate, up = tensor.chunk(2, dim=1)
            return [
                shard(key, gate, 1, tp_rank, 2 * tp_size, replica),
                shard(key, up, 1, tp_size + tp_rank, 2 * tp_size, replica),
            ]

        def join(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(parts, dim=1)

        key1, key2 = f"{prefix}experts.linear_fc1.weight", f"{prefix}experts.linear_fc2.weight"
        if self.gated:
            first: Any = ShardedTensorFactory(key1, self.weight1, split, join, replica_id)
        else:
            first = shard(key1, self.weight1, 1, tp_rank, tp_size, replica_id)
        return {
            f"{prefix}weight1": first,
            f"{prefix}weight2": shard(key2, self.weight2, 2, tp_rank, tp_size, replica_id),
            **sharded_scalars(self, prefix, sharded_offsets, metadata),
        }


def sharded_scalars(
    experts: Any, prefix: str, sharded_offsets: tuple[Any, ...], metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """megatron-core's description of the activation's scalars, which all experts of a layer, on all ranks, share."""
    return sharded_state_dict_default(
        experts.activation, f"{prefix}activation.", sharded_offsets, metadata, tp_group=experts.scalars_group
    )


def routed_experts(config: Any) -> type:
    """The class of the routed experts that `ling.platform.select` chose."""
    if config.operations["experts"] == "te":
        from ling.model.te import TEGroupedExperts

        return TEGroupedExperts
    return GroupedExperts


class LingMoE(MoELayer):
    """megatron-core's MoE layer with Ling's router, experts and shared experts in its slots."""

    def __init__(self, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        kwargs.pop("tp_group", None)
        submodules = MoESubmodules(experts=routed_experts(config), shared_experts=SharedExperts, router=LingRouter)
        super().__init__(config=config, submodules=submodules, pg_collection=pg_collection, **kwargs)

    def set_layer_number(self, layer_number: int) -> None:
        """Tell the parts which layer this is (1-based, MTP layers after the others)."""
        super().set_layer_number(layer_number)
        self.experts.set_layer_number(layer_number)
        if self.use_shared_expert:
            self.shared_experts.set_layer_number(layer_number)
