"""The world of ranks and the groups in it."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ling.config.derived import expert_tensor_parallel_size
from ling.config.schema import ParallelConfig
from ling.platform import Platform


@dataclass(frozen=True)
class World:
    """Who this process is."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun says; without it, the only rank of a world of one."""
        read = {name: int(os.environ.get(name, default)) for name, default in _ENVIRONMENT.items()}
        return cls(read["RANK"], read["WORLD_SIZE"], read["LOCAL_RANK"], read["LOCAL_WORLD_SIZE"])

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and speaks to the user."""
        return self.rank == 0

    @property
    def local_ranks(self) -> range:
        """The ranks on this machine."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)


_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of its ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def connect(platform: Platform, world: World, timeout_minutes: float = 30) -> None:
    """Join torch.distributed's process group; a world of one needs no network."""
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if world.size == 1 and not under_torchrun():
        store = dist.HashStore()
        dist.init_process_group(platform.collectives, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(platform.collectives, timeout=timeout)


def build_groups(parallel: ParallelConfig) -> None:
    """Make megatron-core's process groups of a layout, and its random states.

    Any groups made before are given up first, so that one process can try several layouts.
    """
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size(parallel),
        create_gloo_process_groups=False,
    )


def seed_random_states(seed: int) -> None:
    """Seed torch and megatron-core's random states (dropout, router noise); weights have seeds of their own."""
    from megatron.core import tensor_parallel

    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def disconnect() -> None:
    """Give up the groups and the process group."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Group:
    """One process group as this rank sees it."""

    group: Any
    rank: int
    size: int


def _group(handle: Any) -> Group:
    return Group(handle, handle.rank(), handle.size())


def tensor() -> Group:
    """Ranks that share each matrix (TP)."""
    from megatron.core import parallel_state

    return _group(parallel_state.get_tensor_model_parallel_group())


def data() -> Group:
    """Ranks that hold the same weights and see other samples (DP)."""
    from megatron.core import parallel_state

    return _group(parallel_state.get_data_parallel_group())


def pipeline() -> Group:
    """Ranks that hold consecutive layers (PP)."""
    from megatron.core import parallel_state

    return _group(parallel_state.get_pipeline_model_parallel_group())


def expert() -> Group:
    """Ranks that share the experts of a layer (EP)."""
    from megatron.core import parallel_state

    return _group(parallel_state.get_expert_model_parallel_group())


def expert_tensor() -> Group:
    """Ranks that share each expert's matrices (ETP)."""
    from megatron.core import parallel_state

    return _group(parallel_state.get_expert_tensor_parallel_group())


def tensor_and_data() -> Group:
    """All ranks that see tokens of the same layers: TP times DP."""
    from megatron.core import parallel_state

    return _group(parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))


def data_with_context() -> Any:
    """DP times CP, the group that checkpoints replicate over."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def is_first_stage(vp_stage: int | None = None) -> bool:
    """Whether this rank's model chunk begins with the embedding."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def is_last_stage(vp_stage: int | None = None) -> bool:
    """Whether this rank's model chunk ends with the loss."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
