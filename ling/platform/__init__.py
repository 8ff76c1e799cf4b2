"""Where `ling` runs: CUDA or CPU behind one small interface, and the only place that knows about devices."""

from ling.platform.base import Platform, Stopwatch, get_platform

__all__ = ["Platform", "Stopwatch", "get_platform"]
