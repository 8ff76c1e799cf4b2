"""What a start finds in the run's folder: the checkpoint to continue from, and how the attempts before have ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ling.checkpoint.control import Control
from ling.checkpoint.start import Start, find_start
from ling.config import Config
from ling.config.derived import valid_sources
from ling.job.attempts import Attempt, read_attempts
from ling.job.rank import RankJob
from ling.observe.console import duration
from ling.observe.metrics import read_metrics


@dataclass(frozen=True)
class Beginning:
    """Where this attempt begins; the same on all ranks.

    Attributes:
        checkpoint: what it continues from; None: from nothing.
        owes_evaluation: whether the evaluation that was due at that step has been cut off.
        attempt: its number; None where there is nothing to do.
    """

    checkpoint: Start | None
    owes_evaluation: bool
    attempt: int | None

    @property
    def step(self) -> int:
        """Of the run, when this attempt begins."""
        return self.checkpoint.step if self.checkpoint is not None else 0


def begin(config: Config, job: RankJob, claim: Callable[[], None], started: float) -> Beginning:
    """Take the run's folder, see where to continue, and begin the attempt. All ranks call it; rank 0 writes and speaks.

    Args:
        claim: makes the run's folder this job's own; called on rank 0.
        started: when this process began, as `time.monotonic` has it.

    Raises:
        UserError: the folder or its checkpoints are not to be had; on all ranks.
    """
    control = Control()
    control.from_main(claim)
    job.is_claimed = True
    found = find_start(config, job.run_dir, print if job.place.rank == 0 else lambda text: None)
    owes, attempt = control.from_main(lambda: _begin_attempt(config, job, found, started))
    return Beginning(found, owes, attempt)


def _begin_attempt(config: Config, job: RankJob, found: Start | None, started: float) -> tuple[bool, int | None]:
    """Whether an evaluation is owed, and the number of the attempt, unless nothing is left to do."""
    folder, train = job.run_dir, config.train
    step = found.step if found is not None else 0
    is_due = step == train.train_iters or (train.eval_interval > 0 and step > 0 and step % train.eval_interval == 0)
    known = [record["step"] for record in read_metrics(folder) if "eval" in record]
    owes = is_due and found is not None and found.is_own and bool(valid_sources(config)) and step not in known
    if step >= train.train_iters and not owes:
        return False, None
    earlier = read_attempts(folder)
    nodes, world_size = job.place.world_size // len(job.place.local_ranks), job.place.world_size
    job.attempt = Attempt.begin(folder, started=started, resumed_from=step, nodes=nodes, world_size=world_size)
    if earlier:
        print(_history(earlier[-1], job.attempt, found.folder if found is not None else None), flush=True)
    return owes, job.attempt.number


def _history(last: dict[str, Any], attempt: Attempt, checkpoint: Path | None) -> str:
    replayed = attempt.values["replayed_steps"]
    again = f", {replayed} step{'s' * (replayed != 1)} to do again" if replayed else ""
    since = duration(max(0.0, attempt.values["start"] - last["end"]))
    source = f"continuing from {checkpoint}" if checkpoint is not None else "there is no checkpoint: from the beginning"
    return f"ling: attempt {attempt.number}; attempt {last['attempt']} {last['ended']}, {since} before; {source}{again}"
