"""Tokens per second, model FLOP/s and MFU of a step."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Dense bf16 tensor-core peaks in TFLOP/s from NVIDIA's data sheets, which mostly print twice as much, "with sparsity".
# The most specific name wins. SXM parts where nothing else is said.
PEAK_TFLOPS: dict[str, float] = {
    "A30": 165.0,
    "A40": 149.7,
    "A100": 312.0,
    "A800": 312.0,
    "L4": 121.0,
    "L40": 181.05,
    "L40S": 362.05,
    "H20": 148.0,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.4,
    "H800 PCIe": 756.0,
    "H200": 989.4,
    "H200 NVL": 835.0,
    "GH200": 989.4,
    "B200": 2250.0,
    "B300": 2250.0,
    "GB200": 2500.0,
    "GB300": 2500.0,
}


def find_peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in TFLOP/s by its name ("NVIDIA H100 80GB HBM3"); None where it is not known.

    A MIG slice has a part of its device's peak, so none is given for it.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    names = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name, re.IGNORECASE)]
    return PEAK_TFLOPS[max(names, key=len)] if names else None


@dataclass
class Throughput:
    """Rates of a run.

    Args:
        flops_per_token: model FLOPs of one token, forward and backward, recomputation not counted.
        devices: ranks of the run.
        peak_tflops: dense peak of one device in TFLOP/s; None where it is not known, then there is no MFU.
    """

    flops_per_token: float
    devices: int
    peak_tflops: float | None = None

    def measure(self, tokens: float, step_seconds: float) -> dict[str, float | None]:
        """Rates of a step of so many tokens over all ranks that took `step_seconds`.

        tokens_per_s            = tokens / step_seconds
        tokens_per_s_per_device = tokens_per_s / devices
        tflops_per_device       = tokens_per_s_per_device * flops_per_token / 1e12
        mfu                     = tflops_per_device / peak_tflops, as a fraction (PaLM, arXiv 2204.02311, appendix B);
                                  the peak is the dense bf16 one, also for a run in fp8
        """
        if step_seconds <= 0:
            raise ValueError(f"a step takes longer than {step_seconds} s")
        per_device = tokens / step_seconds / self.devices
        tflops = per_device * self.flops_per_token / 1e12
        return {
            "tokens_per_s": per_device * self.devices,
            "tokens_per_s_per_device": per_device,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
        }
