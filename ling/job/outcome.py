"""How an attempt ended: `job/outcome.json`, and the same in words.

Reasons: `done`, `stopped` (on purpose, with a checkpoint), `non-finite` (loss or gradient), `not saved` (a checkpoint),
`hung`, `failed`. The first cause counts: when a rank fails, the others soon fail too, since they wait for it, and their
errors are consequences.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ling.job.files import create_json, job_folder, read_json, remove, replace_json

_CONSEQUENCE = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|remote process exited|remoteerror|"
    r"connection was likely closed|recvvalue failed|sendbytes failed|recvbytes failed|failed to recv|"
    r"timed? ?out waiting|wait timeout|watchdog caught collective|socket error|store.*timeout|"
    r"gloo.*(timed out|transport)",
    re.IGNORECASE,
)
_CONSEQUENCE_TYPES = ("DistNetworkError", "DistStoreError", "DistBackendError", "ConnectionError", "BrokenPipeError")


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank."""

    rank: int | None
    node: str
    step: int | None
    error: str
    reason: str = "failed"
    is_consequence: bool = False
    log: str | None = None

    def words(self) -> str:
        """One line: where, when, what, and where there is more to read."""
        rank = "a rank" if self.rank is None else f"rank {self.rank}"
        step = "" if self.step is None else f" at step {self.step}"
        log = f"; see {self.log}" if self.log else ""
        return f"{rank} ({self.node}) {'hung' if self.reason == 'hung' else 'failed'}{step}: {self.error}{log}"


def failure_of(error: BaseException, rank: int, node: str, step: int | None) -> Failure:
    """The failure that an exception is; network errors are taken for the consequence of another rank's failure."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    known = name in _CONSEQUENCE_TYPES or isinstance(error, ConnectionError)
    consequence = known or (isinstance(error, RuntimeError) and _CONSEQUENCE.search(text) is not None)
    more = "; a consequence: the rank or machine at the other end had gone" if consequence else ""
    said = f"{name}: {text}"[: 500 - len(more)] if text else name
    return Failure(rank, node, step, said + more, is_consequence=consequence)


def killed(rank: int | None, node: str, step: int | None, code: int | None = None) -> Failure:
    """The failure of a rank that ended without a word, with its process' exit code where that is known."""
    if code is not None and code >= 0:
        return Failure(rank, node, step, f"the process ended with code {code}", is_consequence=True)  # of what it said
    name = signal.Signals(-code).name if code is not None else "a signal"
    more = ", as happens when memory runs out" if name in ("SIGKILL", "a signal") else ""
    return Failure(rank, node, step, f"the process was killed by {name}{more}")


def outcome_path(run_dir: Path) -> Path:
    """The file that says how the latest attempt ended."""
    return job_folder(run_dir) / "outcome.json"


def read_outcome(run_dir: Path) -> dict[str, Any] | None:
    """How the latest attempt ended; None while it runs, or when it was killed."""
    return read_json(outcome_path(run_dir))


def write_outcome(run_dir: Path, outcome: Mapping[str, Any]) -> None:
    """Say how this attempt ended."""
    replace_json(outcome_path(run_dir), outcome)


def write_failure(run_dir: Path, failure: Failure) -> tuple[dict[str, Any], bool]:
    """Say how this attempt failed, unless that has been said; returns what counts, and whether it is this.

    A cause takes the place of a consequence.
    """
    values = {key: value for key, value in asdict(failure).items() if value is not None and value is not False}
    outcome = {"reason": values.pop("reason"), **values}
    if create_json(outcome_path(run_dir), outcome):
        return outcome, True
    said = read_outcome(run_dir) or outcome
    if said.get("is_consequence") and not failure.is_consequence:
        write_outcome(run_dir, outcome)
        return outcome, True
    return said, False


def forget_outcome(run_dir: Path) -> None:
    """Remove what an earlier attempt left."""
    remove(outcome_path(run_dir))


def in_words(outcome: Mapping[str, Any] | None) -> str:
    """An outcome as part of a sentence: `stopped at step 120 (SIGUSR1)`."""
    if not outcome or "reason" not in outcome:
        return "was killed, or its machine failed"
    step = f" at step {outcome['step']}" if outcome.get("step") is not None else ""
    reason = outcome["reason"]
    if reason == "stopped":
        return f"stopped{step} ({outcome.get('cause', '?')})"
    if reason == "done":
        return f"was done{step}"
    if reason == "not saved":
        return f"ended since a checkpoint could not be saved: {outcome.get('error', '?')}"
    if reason == "non-finite":
        return f"stopped for a loss or gradient that is not finite: {outcome.get('error', '?')}"
    node, error = outcome.get("node"), outcome.get("error", "?")
    if node is None:  # all ranks at once
        return f"{reason}: {error}"
    failure = Failure(outcome.get("rank"), node, outcome.get("step"), error, reason, log=outcome.get("log"))
    return failure.words()
