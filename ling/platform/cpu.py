"""megatron-core on a machine without a GPU: the whole adaptation, in one place.

megatron-core asks torch for CUDA devices, streams and random states by name. On the CPU each of those names has a plain
meaning (the device is the CPU, a stream runs at once, a random state is the CPU's), and the tables `REPLACED_IN_*` give
it that meaning. Nothing is replaced when `ling` is imported, nor ever on a machine that uses CUDA: only
`CpuPlatform.start` does it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ling.platform import megatron
from ling.platform.optional import shield_megatron_import

CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names of glibc's malloc.h


class CpuStream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: CpuStream) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: CpuEvent) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """An event that has already happened."""
        return event or CpuEvent()


class CpuEvent:
    """An event that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: CpuStream | None = None) -> None:
        """Nothing to record."""

    def wait(self, stream: CpuStream | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


_STREAM = CpuStream()


def _nothing() -> Callable[..., None]:
    """A function that does what there is to do on a CPU; a new one each time, since torch's compiler keeps a table of
    torch's functions in which none may stand twice."""
    return lambda *args, **kwargs: None


@contextlib.contextmanager
def _on_stream(stream: CpuStream | None) -> Iterator[None]:
    yield


def _typed_tensor(name: str, dtype: torch.dtype) -> type:
    """Stand-in for `torch.cuda.FloatTensor(values)` and its kin; a class, since megatron-core also asks isinstance."""
    return type(name, (), {"__new__": lambda cls, values: torch.tensor(values, dtype=dtype)})


def _factory(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.zeros(..., device="cuda")` and its kin make CPU tensors; other devices (`meta`) are left alone."""

    @functools.wraps(create)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
        return create(*args, **kwargs)

    return on_cpu


def _cuda_type_name(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor.type()` as megatron-core's optimizers expect it: `torch.cuda.FloatTensor`."""

    @functools.wraps(type_of)
    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(self, *args, **kwargs)
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return named


def _splits_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Split sizes reach `all_to_all_single` as numbers, although no copy from a GPU turns them into numbers here."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


class Replacement(NamedTuple):
    """`owner.name` becomes `value`; with `wraps`, `value(old)`."""

    owner: str
    name: str
    value: Any
    wraps: bool = False


REPLACED_IN_TORCH: tuple[Replacement, ...] = (
    Replacement("torch.cuda", "current_device", lambda: CPU),
    Replacement("torch.cuda", "set_device", _nothing()),
    Replacement("torch.cuda", "synchronize", _nothing()),
    Replacement("torch.cuda", "empty_cache", _nothing()),
    Replacement("torch.cuda", "Stream", CpuStream),
    Replacement("torch.cuda", "Event", CpuEvent),
    Replacement("torch.cuda", "stream", _on_stream),
    Replacement("torch.cuda", "current_stream", lambda *args: _STREAM),
    Replacement("torch.cuda", "default_stream", lambda *args: _STREAM),
    Replacement("torch.cuda", "is_current_stream_capturing", lambda: False),
    Replacement("torch.cuda.nvtx", "range_push", _nothing()),
    Replacement("torch.cuda.nvtx", "range_pop", _nothing()),
    Replacement("torch.cuda", "manual_seed", lambda seed: torch.manual_seed(seed)),
    Replacement("torch.cuda", "get_rng_state", _get_rng_state),
    Replacement("torch.cuda", "set_rng_state", _set_rng_state),
    Replacement("torch.cuda", "FloatTensor", _typed_tensor("FloatTensor", torch.float32)),
    Replacement("torch.cuda", "LongTensor", _typed_tensor("LongTensor", torch.int64)),
    Replacement("torch.cuda", "IntTensor", _typed_tensor("IntTensor", torch.int32)),
    Replacement("torch.cuda", "ByteTensor", _typed_tensor("ByteTensor", torch.uint8)),
    Replacement("torch", "tensor", _factory, wraps=True),
    Replacement("torch", "empty", _factory, wraps=True),
    Replacement("torch", "zeros", _factory, wraps=True),
    Replacement("torch", "ones", _factory, wraps=True),
    Replacement("torch", "empty_like", _factory, wraps=True),
    Replacement("torch.Tensor", "cuda", lambda self, *args, **kwargs: self),
    Replacement("torch.nn.Module", "cuda", lambda self, *args, **kwargs: self),
    Replacement("torch.Tensor", "type", _cuda_type_name, wraps=True),
)
REPLACED_IN_MEGATRON: tuple[Replacement, ...] = (
    Replacement("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", _get_rng_state),
    Replacement("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state),
    Replacement("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", _splits_as_numpy),
)

_originals: dict[tuple[str, str], Any] = {}


def _owner(path: str) -> Any:
    """The module or class that a dotted path names."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        if not parent:
            raise
        return getattr(importlib.import_module(parent), name)


def _replace(entry: Replacement) -> None:
    key = (entry.owner, entry.name)
    if key in _originals:
        return
    try:
        owner = _owner(entry.owner)
        original = getattr(owner, entry.name)
    except (ModuleNotFoundError, AttributeError):
        raise megatron.unsupported(f"{entry.owner}.{entry.name} has moved") from None
    _originals[key] = original
    setattr(owner, entry.name, entry.value(original) if entry.wraps else entry.value)


@contextlib.contextmanager
def _eager_decorators() -> Iterator[None]:
    """While megatron-core is imported, its `torch.compile` decorators leave functions as they are (compiling takes
    longer than the small models of this platform train)."""
    compile_, torch.compile = torch.compile, lambda function=None, **kwargs: function or (lambda f: f)  # type: ignore
    try:
        yield
    finally:
        torch.compile = compile_


def adapt_megatron() -> None:
    """Put every name of `REPLACED_IN_TORCH` and `REPLACED_IN_MEGATRON` in place; a second call changes nothing.

    Raises:
        UserError: megatron-core is missing or unsupported, or a replaced name is not where it was.
    """
    shield_megatron_import()
    with torch.device(CPU):  # at its first use such a context notes which functions make tensors: the true ones
        torch.empty(0)
    for entry in REPLACED_IN_TORCH:
        _replace(entry)
    with _eager_decorators():
        megatron.check_version()
        for entry in REPLACED_IN_MEGATRON:
            _replace(entry)


class CpuPlatform:
    """See `ling.platform.base.Platform`."""

    name = "cpu"
    collectives = "gloo"
    device = CPU

    def start(self, local_rank: int, num_threads: int | None = None) -> None:
        """Adapt megatron-core; `num_threads` null means all cores shared between the ranks of this machine."""
        if num_threads is None:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            num_threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        torch.set_num_threads(num_threads)
        _keep_freed_memory()
        adapt_megatron()

    def device_name(self) -> str:
        names = [line.split(":", 1)[1].strip() for line in _cpuinfo("model name")]
        return names[0] if names else "CPU"

    def bf16_is_fast(self) -> bool:
        flags = " ".join(_cpuinfo("flags")[:1]).split()
        return "amx_bf16" in flags or "avx512_bf16" in flags

    def synchronize(self) -> None:
        """A CPU has done what it was asked when the call returns."""

    def peak_memory_gib(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def stopwatch(self) -> CpuStopwatch:
        return CpuStopwatch()


class CpuStopwatch:
    """See `ling.platform.base.Stopwatch`: the wall clock, since a call returns when its work is done."""

    def __init__(self) -> None:
        self._started = self._total_s = 0.0

    def start(self, barrier: bool = False) -> None:
        self._started = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        self._total_s += time.perf_counter() - self._started

    def reset(self) -> None:
        self._total_s = 0.0

    def total_ms(self) -> float:
        return self._total_s * 1e3


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: a training step asks for the same large blocks again.

    Fetching fresh pages from the system took about a tenth of a small model's step (docs/LOG.md).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _cpuinfo(key: str) -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return [line.rstrip("\n") for line in file if line.startswith(key)]
    except OSError:
        return []
