"""A run's attempts: every start that trains, how it ended, what it had to do again (`job/attempts.jsonl`).

One object per line: `attempt, start, end` (Unix seconds), `seconds` (by a clock that cannot jump; absent where the
attempt was killed), `startup_s` (until the first step), `reason`, `ended` (in words), `first_step, last_step`,
`resumed_from` (a step; 0: a fresh start), `replayed_steps` and `replayed_s` (done by earlier attempts after that
checkpoint), `node, nodes, world_size, job`. The attempt that runs stands in `job/attempt.json`; where it is killed, the
next start ends it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ling.job.files import job_folder, node_name, read_json, remove, replace_json
from ling.job.outcome import in_words, read_outcome
from ling.observe.metrics import METRICS, read_metrics

ATTEMPTS = "attempts.jsonl"
CURRENT = "attempt.json"


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """All attempts that have ended, in order; a half line that a crash left is passed over."""
    path = job_folder(run_dir) / ATTEMPTS
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [attempt for attempt in found if isinstance(attempt, dict)]


def end_killed_attempt(run_dir: Path) -> dict[str, Any] | None:
    """End the attempt that did not end itself, if there is one, by what it left; returns the last attempt ever."""
    current = read_json(job_folder(run_dir) / CURRENT)
    attempts = read_attempts(run_dir)
    if current is not None and current.get("attempt") not in [attempt.get("attempt") for attempt in attempts]:
        outcome = read_outcome(run_dir)
        metrics = run_dir / METRICS
        seen = [(job_folder(run_dir) / CURRENT).stat().st_mtime]
        seen += [metrics.stat().st_mtime] if metrics.exists() else []
        steps = [record["step"] for record in read_metrics(run_dir) if record.get("attempt") == current.get("attempt")]
        end = {"end": max(seen), "last_step": max(steps, default=None), "outcome": outcome}
        attempts.append(_append(run_dir, current, outcome, end))
    remove(job_folder(run_dir) / CURRENT)
    return attempts[-1] if attempts else None


class Attempt:
    """The attempt that this process leads; only rank 0 has one."""

    def __init__(self, run_dir: Path, values: dict[str, Any], started: float) -> None:
        self.run_dir, self.values, self._started = run_dir, values, started

    @classmethod
    def begin(cls, run_dir: Path, *, started: float, resumed_from: int, nodes: int, world_size: int) -> Attempt:
        """Begin the next attempt.

        Args:
            started: when the process began, as `time.monotonic` has it.
            resumed_from: the step of the checkpoint that it continues from, or 0.
        """
        records = read_metrics(run_dir)
        last = max((entry.get("attempt", 0) for entry in [*read_attempts(run_dir), *records]), default=0)
        again = [record for record in records if record.get("step", 0) > resumed_from and "step_ms" in record]
        values = {
            "attempt": last + 1,
            "start": time.time() - (time.monotonic() - started),
            "resumed_from": resumed_from,
            "replayed_steps": len({record["step"] for record in again}),
            "replayed_s": round(sum(record["step_ms"] for record in again) / 1e3, 3),
            "node": node_name(),
            "nodes": nodes,
            "world_size": world_size,
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        replace_json(job_folder(run_dir) / CURRENT, values)
        return cls(run_dir, values, started)

    @property
    def number(self) -> int:
        """Which attempt of the run this is, from 1."""
        return self.values["attempt"]

    def first_step(self) -> None:
        """Take note that training begins now."""
        self.values["startup_s"] = round(time.monotonic() - self._started, 3)
        replace_json(job_folder(self.run_dir) / CURRENT, self.values)

    def end(self, outcome: Mapping[str, Any], last_step: int | None) -> None:
        """End it."""
        seconds = round(time.monotonic() - self._started, 3)
        ended = {"end": self.values["start"] + seconds, "seconds": seconds, "last_step": last_step}
        _append(self.run_dir, self.values, outcome, ended)
        remove(job_folder(self.run_dir) / CURRENT)


def _append(
    run_dir: Path, values: Mapping[str, Any], outcome: Mapping[str, Any] | None, more: Mapping[str, Any]
) -> dict[str, Any]:
    first = values.get("resumed_from", 0) + 1
    reason = {"reason": outcome["reason"] if outcome else "killed", "ended": in_words(outcome)}
    line = {**values, "first_step": first, **reason, **{key: value for key, value in more.items() if key != "outcome"}}
    path = job_folder(run_dir) / ATTEMPTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and _last_byte(file) != b"\n":  # a crash left half a line
            file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return line


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)
