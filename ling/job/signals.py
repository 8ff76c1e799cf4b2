"""Signals that ask a job to stop: noted at once, acted upon between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGTERM: schedulers and `kill`; SIGINT: Ctrl-C; SIGUSR1: what a batch script sends before its time is over."""


INTERRUPTED = 130
"""Exit code after a second SIGINT."""


class StopSignals:
    """Notes stop signals while it is entered. A second SIGINT ends the process at once, whatever it is doing: a thread
    counts them, since the main one may be inside a collective, where Python calls no handler."""

    def __init__(self, speak: bool = False) -> None:
        self.received: list[str] = []
        self._speak = speak
        self._before: dict[signal.Signals, Any] = {}
        self._pipe = self._wakeup_before = -1

    def __enter__(self) -> StopSignals:
        arrivals, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._leave_to_parent)
        threading.Thread(target=_count_interrupts, args=(arrivals,), name="ling-signals", daemon=True).start()
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._pipe)
        self._pipe = -1

    def _leave_to_parent(self) -> None:
        """In a forked process, such as one that reads data ahead: its signals are not those of this one."""
        if self._pipe >= 0:
            signal.set_wakeup_fd(-1)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name in self.received:
            return
        self.received.append(name)
        if self._speak:  # the raw call: a handler may interrupt a print
            again = "; again: stop at once" if number == signal.SIGINT else ""
            os.write(2, f"ling: {name}: finishing the step, then saving and stopping{again}\n".encode())


def _count_interrupts(arrivals: int) -> None:
    """Read the numbers of signals as they arrive, to the end of the pipe."""
    count = 0
    while numbers := os.read(arrivals, 64):
        count += numbers.count(signal.SIGINT)
        if count > 1:
            os._exit(INTERRUPTED)
    os.close(arrivals)
