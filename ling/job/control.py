"""What the training loop asks of its job: whether to stop, and a place to say where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from ling.job.deadline import Deadline
from ling.job.progress import Progress
from ling.job.signals import STOP_SIGNALS, StopSignals

TIME_LIMIT = "time limit"
CAUSES = (*(number.name for number in STOP_SIGNALS), TIME_LIMIT)
"""Why a run may be stopped early on purpose."""


@dataclass
class JobControl:
    """The job as the training loop sees it; without arguments it never asks for a stop.

    Each rank has wishes. They are summed in a reduction that takes place anyway, so that all ranks come to know of a
    wish at the same step.
    """

    signals: StopSignals | None = None
    deadline: Deadline = field(default_factory=Deadline)
    progress: Progress = field(default_factory=Progress)
    cause: str | None = None
    """Why all ranks stop after this step; None: they go on."""

    def wishes(self) -> list[float]:
        """This rank's wish for each of `CAUSES`, 0 or 1."""
        received = self.signals.received if self.signals is not None else []
        return [float(name in received) for name in CAUSES[:-1]] + [float(self.deadline.is_near())]

    def agree(self, sums: list[float]) -> None:
        """Take note of all ranks' wishes, summed."""
        if self.cause is None:
            self.cause = next((cause for cause, wished in zip(CAUSES, sums, strict=True) if wished), None)
