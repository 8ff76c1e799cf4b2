"""What a job file is told: whether to start, and what to do when a start has ended."""

import json
import os
import time

import pytest

from ling.launch import restarts
from ling.launch.reports import RANKS, clock_differences, differences, write_report
from ling.launch.restarts import begin, end, read_answer, read_starts

NODES = ("n1", "n2", "n3")


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run's folder whose newest checkpoint is of step `steps[-1]`."""
    monkeypatch.setattr(restarts, "newest_step", lambda folder: int((folder / "step").read_text()))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "step").write_text("0")
    return tmp_path


def start(run_dir, number, job="7", limit=3):
    problem = begin(run_dir, job, number, NODES, limit)
    for node in NODES:
        write_report(run_dir, f"{job}.{number}", node, {"problems": []})
    return problem


def write_outcome(run_dir, **outcome):
    path = run_dir / "job" / "outcome.json"
    path.write_text(json.dumps(outcome))
    later = time.time() + 10
    os.utime(path, (later, later))


def answer(run_dir, number, limit=3):
    return str(end(run_dir, "7", number, NODES, limit))


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ({"reason": "done", "step": 9}, "done: was done at step 9"),
        ({"reason": "stopped", "step": 4, "cause": "SIGUSR1"}, "again: stopped at step 4 (SIGUSR1)"),
        ({"reason": "hung", "rank": 1, "node": "n2", "step": 3, "error": "x"}, "again: rank 1 (n2) hung at step 3: x"),
        ({"reason": "failed", "rank": 0, "node": "n1", "error": "OSError: y"}, "again: rank 0 (n1) failed: OSError: y"),
        ({"reason": "not saved", "error": "full"}, "again: ended since a checkpoint could not be saved: full"),
        ({"reason": "non-finite", "error": "z"}, "stop: stopped for a loss or gradient that is not finite: z"),
        (
            {"reason": "failed", "error": "data.train: no such file"},
            "stop: failed: data.train: no such file",
        ),
        (None, "again: was killed, or its machine failed"),
    ],
)
def test_answers(run_dir, outcome, expected):
    start(run_dir, 0)
    if outcome is not None:
        write_outcome(run_dir, **outcome)
    assert answer(run_dir, 0) == expected


def test_an_outcome_of_an_earlier_start_does_not_count(run_dir):
    start(run_dir, 0)
    write_outcome(run_dir, reason="failed", error="wrong input")
    os.utime(run_dir / "job" / "outcome.json", (0, 0))
    assert answer(run_dir, 0) == "again: was killed, or its machine failed"


def test_starts_without_progress_are_counted(run_dir):
    assert start(run_dir, 0) is None
    assert answer(run_dir, 0).startswith("again")
    (run_dir / "step").write_text("100")
    assert start(run_dir, 1) is None
    assert start(run_dir, 2) is None  # SLURM's own restart after a dead node: nobody asked `end`
    assert answer(run_dir, 2).startswith("again")
    assert start(run_dir, 3) is None
    told = "3 starts in a row found the checkpoint of step 100 and made no newer one: giving up"
    assert answer(run_dir, 3) == f"stop: was killed, or its machine failed; {told}"
    assert start(run_dir, 4) == told
    kept = read_answer(run_dir)
    assert kept is not None
    assert (kept["word"], kept["reason"], kept["start"]) == ("stop", told, 4)
    assert len(read_starts(run_dir)) == 4
    assert start(run_dir, 0, job="8") is None  # submitted anew, by a person


def test_progress_forgives_what_was_before(run_dir):
    for number in range(2):
        assert start(run_dir, number) is None
    (run_dir / "step").write_text("5")
    assert answer(run_dir, 1, limit=2).startswith("again")


def test_a_done_run_is_done_however_often_it_failed(run_dir):
    start(run_dir, 0)
    write_outcome(run_dir, reason="done", step=3)
    assert answer(run_dir, 0, limit=1).startswith("done")


def test_a_half_line_is_passed_over(run_dir):
    start(run_dir, 0)
    with (run_dir / "job" / "starts.jsonl").open("a") as file:
        file.write('{"job": "7", "st')
    assert len(read_starts(run_dir)) == 1


def test_a_folder_in_use_is_left_alone(run_dir):
    start(run_dir, 0)
    lease = {"job": "SLURM job 6", "pid": 1, "node": "n3", "counter": 1}
    (run_dir / "job" / "lease_1.json").write_text(json.dumps(lease))
    assert answer(run_dir, 0) == f"stop: {run_dir} is in use by process 1 on n3 (SLURM job 6)"
    assert read_answer(run_dir) is None  # that is the other job's to write


def test_bad_nodes_are_excluded(run_dir):
    start(run_dir, 0)
    write_report(run_dir, "7.0", "n2", {"problems": ["7 of 8 GPUs are there"]})
    (run_dir / "job" / "preflight" / "7.0" / "n3.json").unlink()
    assert answer(run_dir, 0) == "exclude: n2,n3: n3: no answer to the preflight; n2: 7 of 8 GPUs are there"
    kept = read_answer(run_dir)
    assert kept is not None
    assert (kept["word"], kept["nodes"], kept["job"], kept["start"]) == ("exclude", ["n2", "n3"], "7", 0)


def test_problems_of_the_ranks_together(run_dir):
    start(run_dir, 0)
    write_report(run_dir, "7.0", RANKS, {"problems": [["n1", "rank 0: ArithmeticError: a matrix product is wrong"]]})
    assert answer(run_dir, 0).startswith("exclude: n1: n1: rank 0: ArithmeticError")
    write_report(run_dir, "7.0", RANKS, {"problems": [["", "all ranks stood at all-reduce after 180 s"]]})
    assert answer(run_dir, 0) == "stop: all ranks stood at all-reduce after 180 s"


def test_where_every_node_is_bad_none_is_excluded(run_dir):
    start(run_dir, 0)
    for node in NODES:
        write_report(run_dir, "7.0", node, {"problems": ["runs has 1 GB left, 9 GB are needed"]})
    assert answer(run_dir, 0).startswith("stop: n1: runs has 1 GB left")


def test_versions_that_differ():
    assert differences({"a": {"driver": "1"}, "b": {"driver": "1"}, "c": {"driver": "2"}}) == [
        ("c", "driver is 2, elsewhere 1")
    ]
    (pair,) = differences({"a": {"nccl": "1"}, "b": {"nccl": "2"}})
    assert pair == ("", "nccl differs between nodes: a has 1, b has 2")
    assert differences({"a": {"torch": "1"}, "b": {}}) == []


def test_clocks_that_differ():
    assert clock_differences({"a": 100.0, "b": 100.5, "c": 99.8}) == []
    assert clock_differences({"a": 0.0, "b": 0.1, "c": 60.0}) == [("c", "its clock is +59.9 s off")]
    assert clock_differences({}) == []


def test_the_command_of_the_job_file(run_dir, capsys):
    argv = [str(run_dir), "--job", "7", "--start", "0", "--max-failures", "1", "--nodes", *NODES]
    assert restarts.main(["begin", *argv]) == 0
    assert restarts.main(["begin", *argv]) == 1
    assert "found no checkpoint and made no newer one: giving up" in capsys.readouterr().err
    assert restarts.main(["end", *argv]) == 0
    assert capsys.readouterr().out.startswith("stop: n1: no answer to the preflight")
