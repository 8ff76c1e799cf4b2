"""How a run is doing, from the files in its folder alone: they can be read while it runs, and after it was killed."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from ling.checkpoint.folder import newest, read_manifest
from ling.config import UserError, load_config
from ling.job.attempts import CURRENT, read_attempts
from ling.job.files import job_folder, read_json
from ling.job.lease import describe, holder
from ling.job.outcome import in_words, read_outcome
from ling.launch.reports import median
from ling.launch.restarts import read_starts
from ling.observe.metrics import read_metrics

RECENT_STEPS = 20
SILENT_AFTER_S = 60.0


def read_status(run_dir: Path, now: float | None = None) -> dict[str, Any]:
    """The status of a run as one object; what is not known is None.

    `state` is running, silent (whoever holds the folder has not been heard of for a while), waiting (no start has begun
    to train yet), or how the last attempt ended: done, stopped, failed, hung, killed, ... Times are in seconds, rates
    the median of the latest `RECENT_STEPS` steps. `goodput` is the part of the time that a job was running in which
    steps were made that still count: not starting, saving, evaluating, nor steps that had to be done again.

    Raises:
        UserError: the folder is no run's.
    """
    if not (run_dir / "config.yaml").is_file() and not job_folder(run_dir).is_dir():
        raise UserError(f"{run_dir} is no run's folder; give the folder that has config.yaml in it, as runs/NAME")
    now = time.time() if now is None else now
    records = read_metrics(run_dir)
    steps = [record for record in records if "step_ms" in record]
    attempts, current = read_attempts(run_dir), read_json(job_folder(run_dir) / CURRENT)
    lease, outcome = holder(run_dir), read_outcome(run_dir)
    beat = _lease_age(run_dir, now)
    state = _state(lease is not None, beat, outcome, attempts, current)
    running = current if state in ("running", "silent") else None
    return {
        "run": str(run_dir),
        "state": state,
        "holder": describe(lease) if lease is not None else None,
        "heartbeat_age_s": beat,
        **_progress(run_dir, steps),
        **_checkpoint(run_dir, now),
        "starts": len(read_starts(run_dir)) or None,
        "attempts": len(attempts) + (current is not None),
        "ended": dict(Counter(str(attempt.get("reason")) for attempt in attempts)),
        "first_failure": _first_failure(attempts, outcome, running),
        "slow_ranks": next((r["slow_ranks"] for r in reversed(records) if "slow_ranks" in r), []),
        **_goodput(steps, attempts, running, now),
    }


def _state(
    is_held: bool,
    beat: float | None,
    outcome: dict[str, Any] | None,
    attempts: list[dict[str, Any]],
    current: dict[str, Any] | None,
) -> str:
    if is_held and beat is not None:
        return "running" if beat <= SILENT_AFTER_S else "silent"
    if current is not None:
        return "killed"  # it began and did not end
    if outcome is not None:
        return str(outcome.get("reason", "killed"))
    return str(attempts[-1].get("reason", "killed")) if attempts else "waiting"


def _lease_age(run_dir: Path, now: float) -> float | None:
    times = []
    for path in job_folder(run_dir).glob("lease_*.json"):
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # released at this moment
            continue
    return round(max(0.0, now - max(times)), 1) if times else None


def _progress(run_dir: Path, steps: list[dict[str, Any]]) -> dict[str, Any]:
    known = run_dir / "config.yaml"
    total = load_config(known).train.train_iters if known.is_file() else None
    found: dict[str, Any] = {"step": 0, "train_iters": total, "loss": None, "step_ms": None, "tokens_per_s": None}
    found["eta_s"] = None
    if steps:
        last, recent = steps[-1], steps[-RECENT_STEPS:]
        found |= {"step": last["step"], "loss": last.get("loss")}
        found["step_ms"] = median(record["step_ms"] for record in recent)
        found["tokens_per_s"] = median(record["tokens_per_s"] for record in recent if "tokens_per_s" in record)
        if total is not None:
            found["eta_s"] = round((total - last["step"]) * found["step_ms"] / 1e3, 1)
    return found


def _checkpoint(run_dir: Path, now: float) -> dict[str, Any]:
    folder = newest(run_dir)
    if folder is None:
        return {"checkpoint": None, "checkpoint_step": None, "checkpoint_age_s": None}
    manifest = read_manifest(folder)
    age = round(now - manifest.saved_at, 1) if manifest.saved_at is not None else None
    return {"checkpoint": str(folder), "checkpoint_step": manifest.step, "checkpoint_age_s": age}


def _first_failure(
    attempts: list[dict[str, Any]], outcome: dict[str, Any] | None, running: dict[str, Any] | None
) -> str | None:
    """What ended the last attempt that is over, where that was a failure."""
    if running is None and outcome is not None:
        return None if outcome.get("reason") in ("done", "stopped") else in_words(outcome)
    if not attempts or attempts[-1].get("reason") in ("done", "stopped"):
        return None
    return str(attempts[-1].get("ended"))


def _goodput(
    steps: list[dict[str, Any]], attempts: list[dict[str, Any]], running: dict[str, Any] | None, now: float
) -> dict[str, Any]:
    spent = sum(max(0.0, attempt["end"] - attempt["start"]) for attempt in attempts)
    spent += max(0.0, now - running["start"]) if running is not None else 0.0
    useful = sum(record["step_ms"] for record in steps) / 1e3
    first = min((attempt["start"] for attempt in [*attempts, *([running] if running else [])]), default=None)
    last = now if running is not None else max((attempt["end"] for attempt in attempts), default=None)
    elapsed = last - first if first is not None and last is not None else None
    return {
        "running_s": round(spent, 1),
        "useful_s": round(useful, 1),
        "elapsed_s": round(elapsed, 1) if elapsed is not None else None,
        "goodput": round(min(1.0, useful / spent), 4) if spent else None,
        "replayed_steps": sum(attempt.get("replayed_steps", 0) for attempt in attempts)
        + (running.get("replayed_steps", 0) if running is not None else 0),
    }


def show(status: dict[str, Any]) -> str:
    """The status as text."""
    total = f" of {status['train_iters']}" if status["train_iters"] else ""
    loss = f", loss {status['loss']:.4f}" if isinstance(status["loss"], float) else ""
    rows = [("state", _state_in_words(status)), ("step", f"{status['step']}{total}{loss}")]
    if status["step_ms"] is not None:
        left = f", {_duration(status['eta_s'])} left" if status["eta_s"] else ""
        rows.append(("rate", f"{status['step_ms']:.0f} ms per step, {status['tokens_per_s']:,.0f} tokens/s{left}"))
    age = f", {_duration(status['checkpoint_age_s'])} ago" if status["checkpoint_age_s"] is not None else ""
    rows.append(("checkpoint", f"{status['checkpoint']}{age}" if status["checkpoint"] else "none yet"))
    ends = ", ".join(f"{count} {reason}" for reason, count in status["ended"].items())
    rows.append(("attempts", f"{status['attempts']}" + (f" (ended: {ends})" if ends else "")))
    if status["first_failure"]:
        rows.append(("failure", status["first_failure"]))
    for slow in status["slow_ranks"]:
        rows.append(("slow", f"rank {slow['rank']} ({slow['node']}): {slow['ratio']:.2f}x the middle rank's time"))
    if status["goodput"] is not None:
        again = f"; {status['replayed_steps']} steps done again" if status["replayed_steps"] else ""
        running = f"{_duration(status['useful_s'])} of steps that count in {_duration(status['running_s'])} of running"
        rows.append(("goodput", f"{status['goodput']:.1%}: {running}{again}"))
    return "\n".join([status["run"], *(f"  {name:<11} {text}" for name, text in rows)])


def _state_in_words(status: dict[str, Any]) -> str:
    if status["holder"] is None:
        return str(status["state"])
    return f"{status['state']}: {status['holder']}, last heard of {_duration(status['heartbeat_age_s'])} ago"


def _duration(seconds: float) -> str:
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.1f} days"
