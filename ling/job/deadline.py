"""The time by which a job must have saved and stopped."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ling.config.duration import parse_duration

UNKNOWN_SAVE_S = 120.0
"""Taken for a save while none has been measured, though never more than a tenth of the whole time."""
STEP_SAFETY, SAVE_SAFETY = 1.5, 2.0


@dataclass
class Deadline:
    """When to stop so that the save still fits; times are those of `time.monotonic`.

    Args:
        end: the moment at which the job is taken away; infinite: never.
        source: where that comes from, for messages.
        total: seconds from the start of the job to `end`.
    """

    end: float = math.inf
    source: str = ""
    total: float = math.inf
    longest_step: float = 0.0
    longest_save: float | None = None

    def measured_step(self, seconds: float) -> None:
        """Take note of how long a step took, with all that stands between it and the next one but a save."""
        self.longest_step = max(seconds, 0.9 * self.longest_step)  # the first step of a run is no measure for ever

    def measured_save(self, seconds: float) -> None:
        """Take note of how long a save took."""
        self.longest_save = max(seconds, self.longest_save or 0.0)

    @property
    def margin(self) -> float:
        """Seconds that must be left at the end of a step for another step and a save."""
        save = min(UNKNOWN_SAVE_S, self.total / 10) if self.longest_save is None else SAVE_SAFETY * self.longest_save
        return save + STEP_SAFETY * self.longest_step

    def is_near(self, now: float | None = None) -> bool:
        """Whether another step might be one too many."""
        return (time.monotonic() if now is None else now) + self.margin >= self.end


def find_deadline(time_limit: str | None, started: float, environment: Mapping[str, str] | None = None) -> Deadline:
    """The earlier one of `train.time_limit` and the end of the SLURM job (`SLURM_JOB_END_TIME`).

    An end of the job that has passed already is an old one (its limit was raised): it does not count.

    Args:
        started: when this attempt began, as `time.monotonic` has it.
    """
    environment = os.environ if environment is None else environment
    found = [Deadline()]
    if time_limit is not None:
        total = parse_duration(time_limit)
        found.append(Deadline(started + total, f"train.time_limit {time_limit}", total))
    end_time = environment.get("SLURM_JOB_END_TIME", "")
    if end_time.isdecimal():
        left = int(end_time) - time.time()  # the one look at the wall clock
        total = left + (time.monotonic() - started)
        if left > 0:
            found.append(Deadline(time.monotonic() + left, "the end of the SLURM job", total))
    return min(found, key=lambda deadline: deadline.end)
