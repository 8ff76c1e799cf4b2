"""The stopwatch of CUDA's platform, with events that a clock of the test's stamps; the CPU's is in tests/observe."""

import pytest
import torch

from ling.platform.cuda import CudaStopwatch


@pytest.fixture
def device(monkeypatch):
    """Its `now` in milliseconds, and all the events that were made."""

    class Device:
        now = 0.0
        made: list = []

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing
            Device.made.append(self)

        def record(self):
            self.at = Device.now

        def elapsed_time(self, end):
            return end.at - self.at

    Device.made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return Device


def spend(device, stopwatch, *passes_ms):
    for ms in passes_ms:
        stopwatch.start()
        device.now += ms
        stopwatch.stop()
        device.now += 1000.0  # what comes between two passes does not count


def test_passes_add_up_and_events_are_used_again(device):
    stopwatch = CudaStopwatch()
    spend(device, stopwatch, 3.0, 4.0)
    assert stopwatch.total_ms() == 7.0
    stopwatch.reset()
    assert stopwatch.total_ms() == 0.0
    spend(device, stopwatch, 5.0)
    assert stopwatch.total_ms() == 5.0
    assert len(device.made) == 4
    spend(device, stopwatch, 1.0, 1.0)
    assert stopwatch.total_ms() == 7.0
    assert len(device.made) == 6


def test_a_pass_that_did_not_end_does_not_count(device):
    stopwatch = CudaStopwatch()
    stopwatch.start()  # an exception comes here
    stopwatch.reset()
    spend(device, stopwatch, 2.0)
    assert stopwatch.total_ms() == 2.0
