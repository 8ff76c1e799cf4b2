"""Where a rank stands: its step, what it is doing there, and its stack."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

LOSS_SUM = "sum of the losses"
"""The phase in which all ranks meet in every step."""
_PACKAGE = f"{Path(__file__).parents[1]}/"
_WAITING = ("torch/distributed/", "torch/cuda/", "megatron/core/pipeline_parallel/p2p")


@dataclass
class Progress:
    """What the main thread does; `mark` is called by it, everything is read by the watchdog's thread."""

    step: int = 0
    phase: str = "starting"
    marks: int = 0
    is_slow: bool = True
    """Whether this may take longer than a step: the start, the first step, loading, saving."""
    _steps_before: int = 0

    def mark(self, phase: str, step: int | None = None, is_slow: bool = False) -> None:
        """The main thread begins with `phase` (`forward and backward`, `saving`, ...), of step `step`."""
        if step is not None and step != self.step:
            self._steps_before += 1
            self.step = step
        self.phase, self.is_slow = phase, is_slow or self._steps_before <= 1
        self.marks += 1

    def tick(self) -> None:
        """The main thread is still on its way in the same phase: another micro-batch."""
        self.marks += 1


def where(thread_id: int | None = None) -> dict[str, Any]:
    """Where a thread stands (the main one unless told): `place`, its innermost line in ling and the innermost of all,
    and whether it is `waiting` for other ranks there."""
    frame = sys._current_frames().get(thread_id or threading.main_thread().ident or 0)
    if frame is None:
        return {"place": "no stack", "waiting": False}
    frames: list[FrameType] = []
    at: FrameType | None = frame
    while at is not None:
        frames.append(at)
        at = at.f_back
    names = [frame.f_code.co_filename.replace("\\", "/") for frame in frames]
    ours = next((_shown(f) for f, name in zip(frames, names, strict=True) if name.startswith(_PACKAGE)), None)
    inner = _shown(frames[0])
    place = inner if ours in (None, inner) else f"{ours} > {inner}"
    return {"place": place, "waiting": any(part in name for name in names[:4] for part in _WAITING)}


def write_stacks(path: Path, title: str) -> None:
    """Write the stacks of all threads of this process to a file, after those that stand there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    with path.open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
        for ident, frame in sys._current_frames().items():
            file.write(f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}\n")


def _shown(frame: FrameType) -> str:
    parts = Path(frame.f_code.co_filename).parts
    return f"{'/'.join(parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
