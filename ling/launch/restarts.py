"""Whether a job starts, and what becomes of it when it has ended: the questions that a job file asks.

    python -m ling.launch.restarts begin RUN --job J --start N ...    # code 1: there is no point in starting
    python -m ling.launch.restarts end RUN --job J --start N ...      # prints the answer

The answers are `done`, `again`, `exclude: NODE,NODE` and `stop`, each with `: REASON`. Every start is noted in
`job/starts.jsonl` with the step of the newest checkpoint that it found. So many starts in a row that found the same one
are enough: the job gives up, whatever ended them. A job that is submitted anew begins to count again. The latest answer
stays in `job/answer.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ling.checkpoint.folder import newest, read_manifest
from ling.job.files import job_folder, read_json, replace_json
from ling.job.lease import describe, holder
from ling.job.outcome import in_words, outcome_path, read_outcome
from ling.launch.reports import problems_of, report_folder

STARTS = "starts.jsonl"
ANSWER = "answer.json"


@dataclass(frozen=True)
class Answer:
    """What the job file is to do: `word` is done, again, exclude or stop; `nodes` are those to keep off."""

    word: str
    reason: str
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.word}: {','.join(self.nodes) + ': ' if self.nodes else ''}{self.reason}"


def starts_path(run_dir: Path) -> Path:
    """The file with a line for every start."""
    return job_folder(run_dir) / STARTS


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Every start of every job of a run; a half line that a crash left is passed over."""
    path = starts_path(run_dir)
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [start for start in found if isinstance(start, dict)]


def begin(run_dir: Path, job: str, start: int, nodes: Sequence[str], max_failures: int) -> str | None:
    """Note a start; or say why there is no point in it."""
    step = newest_step(run_dir)
    fruitless = _fruitless(run_dir, job, step)
    if fruitless >= max_failures:
        reason = _gave_up(fruitless, step)
        _note(run_dir, job, start, Answer("stop", reason))
        return reason
    path = starts_path(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {"job": job, "start": start, "time": time.time(), "step": step, "nodes": list(nodes)}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    report_folder(run_dir, f"{job}.{start}").mkdir(parents=True, exist_ok=True)
    return None


def end(run_dir: Path, job: str, start: int, nodes: Sequence[str], max_failures: int) -> Answer:
    """What to do now that a start has ended."""
    answer = _wanted(run_dir, job, start, nodes)
    step = newest_step(run_dir)
    fruitless = _fruitless(run_dir, job, step)
    if answer.word in ("again", "exclude") and fruitless >= max_failures:
        answer = Answer("stop", f"{answer.reason}; {_gave_up(fruitless, step)}")
    if not _is_of_another_job(run_dir):  # that one's folder is not ours to write in
        _note(run_dir, job, start, answer)
    return answer


def read_answer(run_dir: Path) -> dict[str, Any] | None:
    """The latest answer that a job file was given: `word, reason, nodes, job, start, time`; None before the first."""
    return read_json(job_folder(run_dir) / ANSWER)


def _note(run_dir: Path, job: str, start: int, answer: Answer) -> None:
    replace_json(job_folder(run_dir) / ANSWER, {**asdict(answer), "job": job, "start": start, "time": time.time()})


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    folder = newest(run_dir)
    return read_manifest(folder).step if folder is not None else 0


def _wanted(run_dir: Path, job: str, start: int, nodes: Sequence[str]) -> Answer:
    """The answer before the starts without progress are counted."""
    if _is_of_another_job(run_dir):
        return Answer("stop", f"{run_dir} is in use by {describe(holder(run_dir) or {})}")
    problems = problems_of(run_dir, f"{job}.{start}", nodes)
    if problems is not None and problems.reasons:
        if problems.nodes and len(problems.nodes) < len(nodes):
            return Answer("exclude", "; ".join(problems.reasons), problems.nodes)
        return Answer("stop", "; ".join(problems.reasons))
    outcome = read_outcome(run_dir) if is_newer(outcome_path(run_dir), starts_path(run_dir)) else None
    reason = outcome.get("reason") if outcome is not None else None
    if reason == "done":
        return Answer("done", in_words(outcome))
    if reason == "non-finite" or (outcome is not None and _is_wrong_input(outcome)):
        return Answer("stop", in_words(outcome))
    return Answer("again", in_words(outcome))


def _is_of_another_job(run_dir: Path) -> bool:
    other = holder(run_dir)
    mine = f"SLURM job {os.environ.get('SLURM_JOB_ID')}"
    return other is not None and bool(other.get("job")) and other["job"] != mine


def is_newer(path: Path, other: Path) -> bool:
    """Whether a file was written after another one; both have the file system's own times."""
    try:
        return path.stat().st_mtime >= other.stat().st_mtime
    except OSError:
        return False


def _is_wrong_input(outcome: Mapping[str, Any]) -> bool:
    """Whether all ranks refused what they were given: then no rank is named, and a new start changes nothing."""
    refused = outcome.get("reason") == "refused" or str(outcome.get("error", "")).startswith("UserError")
    return refused or (outcome.get("reason") == "failed" and "node" not in outcome)


def _fruitless(run_dir: Path, job: str, step: int) -> int:
    """How many of this job's latest starts in a row found the checkpoint that is still the newest."""
    count = 0
    for start in reversed([start for start in read_starts(run_dir) if start.get("job") == job]):
        if start.get("step") != step:
            break
        count += 1
    return count


def _gave_up(count: int, step: int) -> str:
    checkpoint = f"the checkpoint of step {step}" if step else "no checkpoint"
    return f"{count} start{'s' * (count > 1)} in a row found {checkpoint} and made no newer one: giving up"


def main(argv: Sequence[str] | None = None) -> int:
    """What a job file calls."""
    parser = argparse.ArgumentParser(prog="python -m ling.launch.restarts")
    parser.add_argument("when", choices=("begin", "end"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--job", required=True)
    parser.add_argument("--start", required=True, type=int)
    parser.add_argument("--max-failures", required=True, type=int)
    parser.add_argument("--nodes", nargs="*", default=[])
    args = parser.parse_args(argv)
    given = (args.run, args.job, args.start, args.nodes, args.max_failures)
    if args.when == "end":
        print(end(*given))
        return 0
    problem = begin(*given)
    if problem is not None:
        print(f"ling: error: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
