"""Where the kernels run: each instruction set of the CPU's library, and CUDA."""

import pytest
import torch

from ling.activations import ops

TARGETS = [*(f"cpu-{capability}" for capability in ops.CPU_CAPABILITIES), "cuda"]


def switch_to(target: str) -> str:
    """Use a target, or skip with the reason; its torch device."""
    device, _, capability = target.partition("-")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if ops.problem(device) is not None:
        pytest.skip(ops.problem(device))
    if capability:
        try:
            ops.select_cpu_capability(capability)
        except ValueError as error:
            pytest.skip(str(error))
    return device


@pytest.fixture(params=TARGETS)
def target(request):
    """Every instruction set, and CUDA."""
    before = ops.cpu_capability() if ops.problem("cpu") is None else None
    yield switch_to(request.param)
    if before is not None:
        ops.select_cpu_capability(before)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """The CPU as it is used, and CUDA."""
    return switch_to(request.param)
