"""Attempts: each start that trains leaves one line, also when it was killed, and says what was done again."""

import json
import time
from pathlib import Path

import pytest

from ling.job.attempts import Attempt, end_killed_attempt, read_attempts
from ling.job.outcome import Failure, write_failure
from ling.job.start import _history
from ling.observe.metrics import open_metrics


def train(run_dir, first: int, last: int) -> None:
    """Write records as an attempt does that continues before step `first`."""
    metrics = open_metrics(run_dir, first - 1)
    for step in range(first, last + 1):
        metrics.write({"step": step, "step_ms": 250.0})
    metrics.close()


def begin(run_dir, resumed_from=0, world_size=2) -> Attempt:
    started = time.monotonic() - 7.0
    return Attempt.begin(run_dir, started=started, resumed_from=resumed_from, nodes=1, world_size=world_size)


def test_a_life_in_three_attempts(tmp_path):
    first = begin(tmp_path)
    first.first_step()
    train(tmp_path, 1, 13)
    assert json.loads((tmp_path / "job" / "attempt.json").read_text())["startup_s"] >= 7.0
    assert read_attempts(tmp_path) == []

    last = end_killed_attempt(tmp_path)  # it was killed: the next start finds its traces
    assert (last["attempt"], last["reason"], last["last_step"], last["first_step"]) == (1, "killed", 13, 1)
    assert last["ended"] == "was killed, or its machine failed"
    assert last["end"] == pytest.approx((tmp_path / "metrics.jsonl").stat().st_mtime)
    assert "seconds" not in last

    second = begin(tmp_path, resumed_from=10)
    train(tmp_path, 11, 16)
    second.end({"reason": "stopped", "step": 16, "cause": "SIGTERM"}, 16)
    assert not (tmp_path / "job" / "attempt.json").exists()
    assert end_killed_attempt(tmp_path)["attempt"] == 2
    third = begin(tmp_path, resumed_from=16)
    third.end({"reason": "done", "step": 16}, 16)

    attempts = read_attempts(tmp_path)
    assert [a["attempt"] for a in attempts] == [1, 2, 3]
    assert [a["reason"] for a in attempts] == ["killed", "stopped", "done"]
    assert [a["resumed_from"] for a in attempts] == [0, 10, 16]
    assert [(a["replayed_steps"], a["replayed_s"]) for a in attempts] == [(0, 0.0), (3, 0.75), (0, 0.0)]
    assert attempts[1]["ended"] == "stopped at step 16 (SIGTERM)"
    assert attempts[1]["seconds"] == pytest.approx(attempts[1]["end"] - attempts[1]["start"])
    assert all(a["world_size"] == 2 and a["nodes"] == 1 and a["node"] for a in attempts)


def test_the_failure_that_another_rank_has_noted_is_that_of_a_killed_attempt(tmp_path):
    begin(tmp_path)
    write_failure(tmp_path, Failure(1, "n2", 5, "ValueError: boom"))
    last = end_killed_attempt(tmp_path)
    assert (last["reason"], last["ended"]) == ("failed", "rank 1 (n2) failed at step 5: ValueError: boom")
    assert end_killed_attempt(tmp_path) == last
    assert len(read_attempts(tmp_path)) == 1


def test_a_crash_between_the_line_and_the_removal_gives_no_second_line(tmp_path):
    attempt = begin(tmp_path)
    kept = (tmp_path / "job" / "attempt.json").read_text()
    attempt.end({"reason": "done", "step": 3}, 3)
    (tmp_path / "job" / "attempt.json").write_text(kept)
    assert end_killed_attempt(tmp_path)["reason"] == "done"
    assert len(read_attempts(tmp_path)) == 1


def test_half_a_line_costs_no_other_line(tmp_path):
    begin(tmp_path).end({"reason": "done", "step": 3}, 3)
    with (tmp_path / "job" / "attempts.jsonl").open("a") as file:
        file.write('{"attempt": 2, "rea')
    begin(tmp_path).end({"reason": "done", "step": 4}, 4)
    assert [attempt["last_step"] for attempt in read_attempts(tmp_path)] == [3, 4]


def test_no_attempt_yet(tmp_path):
    assert end_killed_attempt(tmp_path) is None
    assert begin(tmp_path).number == 1


def test_a_clock_that_went_backwards(tmp_path):
    tomorrow = {"attempt": 1, "ended": "stopped at step 3 (SIGTERM)", "end": time.time() + 86400}
    train(tmp_path, 1, 4)
    told = _history(tomorrow, begin(tmp_path, resumed_from=3), Path("checkpoints/step_00000003"))
    assert told == (
        "ling: attempt 2; attempt 1 stopped at step 3 (SIGTERM), 0s before; continuing from "
        "checkpoints/step_00000003, 1 step to do again"
    )
