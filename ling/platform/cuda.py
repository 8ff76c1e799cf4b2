"""NVIDIA GPUs: megatron-core's home, so nothing is adapted."""

from __future__ import annotations

import os

import torch

from ling.platform import megatron
from ling.platform.optional import shield_megatron_import


class CudaPlatform:
    """See `ling.platform.base.Platform`."""

    name = "cuda"
    collectives = "nccl"

    def __init__(self) -> None:
        self._local_rank = 0

    def start(self, local_rank: int, num_threads: int | None = None) -> None:
        """Take GPU number `local_rank`."""
        self._local_rank = local_rank
        # megatron-core overlaps communication and compute by the order of kernels in one queue (before Blackwell).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(local_rank)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        shield_megatron_import()
        megatron.check_version()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self._local_rank)

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self._local_rank)

    def bf16_is_fast(self) -> bool:
        return torch.cuda.get_device_capability(self._local_rank) >= (8, 0)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_memory_gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30

    def stopwatch(self) -> CudaStopwatch:
        return CudaStopwatch()


class CudaStopwatch:
    """See `ling.platform.base.Stopwatch`: pairs of events in the current stream, used again after each `reset`.

    An event is passed when the work before it is done, so time in which the device waits for the host counts where the
    pair stands open, and time in which the host merely runs ahead does not.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._used = 0

    def start(self, barrier: bool = False) -> None:
        if self._used == len(self._pairs):
            self._pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._pairs[self._used][0].record()

    def stop(self, barrier: bool = False) -> None:
        self._pairs[self._used][1].record()
        self._used += 1

    def reset(self) -> None:
        self._used = 0

    def total_ms(self) -> float:
        return sum(begin.elapsed_time(end) for begin, end in self._pairs[: self._used])
