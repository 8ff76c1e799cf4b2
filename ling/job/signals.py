"""Signals that ask a job to stop: noted at once, acted upon between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGTERM: schedulers and `kill`; SIGINT: Ctrl-C; SIGUSR1: what a batch script sends before its time is over."""


class StopSignals:
    """Notes stop signals while it is entered. A second SIGINT ends the process at once, whatever it is doing."""

    def __init__(self, speak: bool = False) -> None:
        self.received: list[str] = []
        self._speak = speak
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # the system ends the process then, even inside a collective
        if name in self.received:
            return
        self.received.append(name)
        if self._speak:  # the raw call: a handler may interrupt a print
            again = "; again: stop at once" if number == signal.SIGINT else ""
            os.write(2, f"ling: {name}: finishing the step, then saving and stopping{again}\n".encode())
