"""The interface that the rest of `ling` sees of the machine it runs on."""

from __future__ import annotations

from typing import Protocol

import torch

from ling.config.errors import UserError


class Stopwatch(Protocol):
    """Adds up the time between `start` and `stop`, as the device spends it; nothing waits for the device."""

    def start(self, barrier: bool = False) -> None:
        """What is asked of the device from here on counts; `barrier` is megatron-core's, and not heeded."""

    def stop(self, barrier: bool = False) -> None:
        """It ends here."""

    def reset(self) -> None:
        """Begin again at 0."""

    def total_ms(self) -> float:
        """Milliseconds since the last `reset`; ask after `Platform.synchronize`."""


class Platform(Protocol):
    """One kind of machine. A process uses exactly one, from start to end."""

    name: str
    """`cpu` or `cuda`."""
    collectives: str
    """Backend of torch.distributed: `gloo` or `nccl`."""

    def start(self, local_rank: int, num_threads: int | None = None) -> None:
        """Take the device of this rank and make megatron-core usable on it. Call it before importing megatron.core."""

    @property
    def device(self) -> torch.device:
        """The device that holds this rank's tensors."""

    def device_name(self) -> str:
        """What a person would call the device."""

    def bf16_is_fast(self) -> bool:
        """Whether the device multiplies bf16 matrices faster than fp32 ones."""

    def synchronize(self) -> None:
        """Wait until the device has done everything that was asked of it."""

    def peak_memory_gib(self) -> float:
        """The most memory that this rank has held so far, in GiB."""

    def stopwatch(self) -> Stopwatch:
        """A new stopwatch for the device's work."""


def get_platform(name: str = "auto") -> Platform:
    """The platform `auto`, `cpu` or `cuda`.

    Raises:
        UserError: CUDA was asked for by name and torch sees none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        from ling.platform.cpu import CpuPlatform

        return CpuPlatform()
    if not torch.cuda.is_available():
        raise UserError(
            f"runtime.platform={name}: torch {torch.__version__} sees no CUDA device; install a CUDA build of torch, "
            "or set runtime.platform=auto"
        )
    from ling.platform.cuda import CudaPlatform

    return CudaPlatform()
