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
from ling.job.outcome import in_words, outcome_path, read_outcome
from ling.launch.reports import median
from ling.launch.restarts import is_newer, read_answer, read_starts, starts_path
from ling.observe.metrics import read_metrics

RECENT_STEPS = 20
SILENT_AFTER_S = 60.0


def read_status(run_dir: Path, now: float | None = None) -> dict[str, Any]:
    """The status of a run as one object; what is not known is None.

    `state` is running, silent (whoever holds the folder has not been heard of for a while), starting (a job file has
    begun and does not train yet), waiting (nothing has begun), or how the last attempt ended: done, stopped, failed,
    hung, killed, ... `answer` is what the job file was told then (again, stop, ...), and None while it runs. Times are
    in seconds, rates the median of the latest `RECENT_STEPS` steps. `goodput` is the part of the time that a job was
    running in which steps were made that still count: not starting, saving, evaluating, nor steps that had to be done
    again.

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
    if outcome is not None and current is None:  # a rank that is ended together with its job leaves its lease behind
        lease = None
    beat = _lease_age(run_dir, now)
    starts = read_starts(run_dir)
    answer = _latest_answer(run_dir, starts)
    since = _start_that_goes_on(run_dir, answer, attempts, current)
    state = _state(lease is not None, beat, outcome, attempts, current, since is not None, _has_given_up(answer))
    running = current if state in ("running", "silent") else None
    return {
        "run": str(run_dir),
        "state": state,
        "stopped": in_words(outcome) if state == "stopped" and outcome is not None else None,
        "holder": describe(lease) if lease is not None else None,
        "heartbeat_age_s": beat,
        **_progress(run_dir, steps),
        **_checkpoint(run_dir, now),
        "starts": len(starts) or None,
        "starting_s": round(max(0.0, now - since), 1) if since is not None and state == "starting" else None,
        "answer": answer if state not in ("running", "silent", "starting") else None,
        "attempts": len(attempts) + (current is not None),
        "restarts": max(0, len(attempts) + (current is not None) - 1),
        "ended": dict(Counter(str(attempt.get("reason")) for attempt in attempts)),
        "first_failure": _first_failure(attempts, outcome, current, running is not None),
        "slow_ranks": next((r["slow_ranks"] for r in reversed(records) if "slow_ranks" in r), []),
        **_goodput(steps, attempts, running, now),
    }


def _state(
    is_held: bool,
    beat: float | None,
    outcome: dict[str, Any] | None,
    attempts: list[dict[str, Any]],
    current: dict[str, Any] | None,
    is_starting: bool,
    has_given_up: bool,
) -> str:
    if is_held and beat is not None:
        return "running" if beat <= SILENT_AFTER_S else "silent"
    if is_starting:
        return "starting"
    if current is not None:
        return "killed"  # it began and did not end
    if outcome is not None:
        return str(outcome.get("reason", "killed"))
    if attempts:
        return str(attempts[-1].get("reason", "killed"))
    return "failed" if has_given_up else "waiting"


def _start_that_goes_on(
    run_dir: Path, answer: dict[str, Any] | None, attempts: list[dict[str, Any]], current: dict[str, Any] | None
) -> float | None:
    """When the latest start of a job file began, if it neither trains nor has ended as far as the files tell: no answer
    was given, no attempt began or ended since. One that SLURM has killed looks the same."""
    starts = read_starts(run_dir)
    if not starts or (current is not None and float(current["start"]) > float(starts[-1]["time"])):
        return None
    began = float(starts[-1]["time"])
    ends = [float(attempt["end"]) for attempt in attempts] + ([float(answer["time"])] if answer is not None else [])
    has_ended = max(ends, default=0.0) > began or is_newer(outcome_path(run_dir), starts_path(run_dir))
    return None if has_ended else began


def _has_given_up(answer: dict[str, Any] | None) -> bool:
    return answer is not None and answer.get("word") == "stop"


def _latest_answer(run_dir: Path, starts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the job file was told after its latest start, or when a further one was refused."""
    answer = read_answer(run_dir)
    is_latest = answer is not None and all(float(answer["time"]) >= float(start["time"]) for start in starts[-1:])
    return answer if is_latest else None


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
    attempts: list[dict[str, Any]],
    outcome: dict[str, Any] | None,
    current: dict[str, Any] | None,
    is_running: bool,
) -> str | None:
    """What ended the last attempt that is over, where that was a failure."""
    if not is_running and outcome is not None:
        return None if outcome.get("reason") in ("done", "stopped") else in_words(outcome)
    if not is_running and current is not None:
        job = f" of SLURM job {current['job']}" if current.get("job") else ""
        return f"attempt {current.get('attempt')}{job}, led by {current.get('node')}, {in_words(None)}"
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
    kept = f"step {status['checkpoint_step']}{age}: {status['checkpoint']}"
    rows.append(("checkpoint", kept if status["checkpoint"] else "none yet"))
    rows.append(("restarts", _restarts(status)))
    if status["first_failure"]:
        rows.append(("failure", status["first_failure"]))
    if status["answer"] is not None and status["answer"].get("word") != "done":
        rows.append(("job file", _answer(status["answer"], status["first_failure"])))
    rows += [("slow", f"rank {slow['rank']} ({slow['node']}): {_slowness(slow)}") for slow in status["slow_ranks"]]
    if status["goodput"] is not None:
        again = f"; {status['replayed_steps']} steps done again" if status["replayed_steps"] else ""
        running = f"{_duration(status['useful_s'])} of steps that count in {_duration(status['running_s'])} of running"
        rows.append(("goodput", f"{status['goodput']:.1%}: {running}{again}"))
    return "\n".join([status["run"], *(f"  {name:<11} {text}" for name, text in rows)])


def _restarts(status: dict[str, Any]) -> str:
    ends = ", ".join(f"{count} {reason}" for reason, count in status["ended"].items())
    starts = f"; the job file began {status['starts']} times" if (status["starts"] or 0) > status["attempts"] else ""
    return f"{status['restarts']}" + (f"; attempts that are over: {ends}" if ends else "") + starts


def _answer(answer: dict[str, Any], failure: str | None) -> str:
    """What the job file was told to do, without the failure that has been told already."""
    reason = str(answer.get("reason")).removeprefix(f"{failure}; ")
    without = f" without {', '.join(answer.get('nodes', []))}" if answer.get("nodes") else ""
    told = {"stop": "gave up"}.get(str(answer.get("word")), f"was told to start again{without}")
    return f"{told}: {reason} (job {answer.get('job')}, start {answer.get('start')})"


def _slowness(slow: dict[str, Any]) -> str:
    return f"{slow['ratio']:.2f}x the time that the middle rank of its stage works ({slow['busy_ms']:.0f} ms a step)"


def _state_in_words(status: dict[str, Any]) -> str:
    if status["state"] == "starting":
        return f"starting since {_duration(status['starting_s'])}: checks before training, or killed in them"
    if status["holder"] is None:
        return str(status["stopped"] or status["state"])
    return f"{status['state']}: {status['holder']}, last heard of {_duration(status['heartbeat_age_s'])} ago"


def _duration(seconds: float) -> str:
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.1f} days"
