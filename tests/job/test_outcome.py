"""How an attempt ended: what counts as the cause, and how it is said."""

import json
from dataclasses import replace

import pytest
import torch.distributed as dist

from ling.job.board import Board, first_cause
from ling.job.outcome import (
    Failure,
    failure_of,
    forget_outcome,
    in_words,
    killed,
    read_outcome,
    write_failure,
    write_outcome,
)

BOOM = Failure(3, "n2", 12, "ValueError: boom", log="logs/error_rank_00003.txt")
CLOSED = Failure(0, "n1", 12, "RuntimeError: Connection closed by peer", is_consequence=True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:3441"),
        RuntimeError("[pair.cc:446] Read error [10.0.0.1]:1: Connection reset by peer"),
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
        RuntimeError("NCCL error: remote process exited or there was a network error"),
        ConnectionResetError(104, "Connection reset by peer"),
        BrokenPipeError(32, "Broken pipe"),
        dist.DistNetworkError("The client socket has failed to connect"),
        dist.DistBackendError("NCCL communicator was aborted on rank 1"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_network_are_consequences(error):
    failure = failure_of(error, 0, "n1", 3)
    assert failure.is_consequence
    assert failure.error.endswith("; a consequence: the rank or machine at the other end had gone")


@pytest.mark.parametrize(
    "error",
    [ValueError("boom"), RuntimeError("CUDA out of memory"), OSError(28, "No space left on device"), KeyError("step")],
    ids=repr,
)
def test_other_errors_are_causes(error):
    failure = failure_of(error, 2, "n1", 3)
    assert not failure.is_consequence
    assert failure.error.startswith(f"{type(error).__name__}: ")


def test_an_error_is_told_in_one_line():
    assert failure_of(RuntimeError("first\n  second"), 0, "n", 1).error == "RuntimeError: first second"
    assert failure_of(AssertionError(), 0, "n", 1).error == "AssertionError"
    assert len(failure_of(RuntimeError("x" * 9999), 0, "n", 1).error) == 500


def test_the_first_cause_counts_not_the_first_to_speak():
    later = Failure(5, "n2", 12, "ValueError: later")
    assert first_cause([CLOSED, BOOM, later]) == BOOM
    assert first_cause([CLOSED]) == CLOSED
    assert first_cause([]) is None


def test_ranks_tell_each_other_of_failures():
    board = Board(dist.HashStore())
    assert board.failures() == []
    for failure in (CLOSED, BOOM):
        board.post_failure(failure)
    assert board.failures() == [CLOSED, BOOM]
    assert [board.is_first("hang"), board.is_first("hang")] == [True, False]
    assert board.get("nothing") is None


def test_the_first_failure_stays(tmp_path):
    outcome, is_first = write_failure(tmp_path, BOOM)
    assert is_first
    expected = {"rank": 3, "node": "n2", "step": 12, "error": "ValueError: boom", "log": BOOM.log}
    assert outcome == read_outcome(tmp_path) == {"reason": "failed"} | expected
    assert write_failure(tmp_path, CLOSED) == (outcome, False)
    assert write_failure(tmp_path, replace(BOOM, rank=4)) == (outcome, False)
    assert json.loads((tmp_path / "job" / "outcome.json").read_text()) == outcome
    forget_outcome(tmp_path)
    assert read_outcome(tmp_path) is None
    write_outcome(tmp_path, {"reason": "done", "step": 6})
    write_outcome(tmp_path, {"reason": "done", "step": 7})
    assert read_outcome(tmp_path) == {"reason": "done", "step": 7}


def test_a_cause_takes_the_place_of_a_consequence(tmp_path):
    assert write_failure(tmp_path, CLOSED)[0]["is_consequence"]
    assert write_failure(tmp_path, BOOM)[0] == read_outcome(tmp_path)
    assert read_outcome(tmp_path)["error"] == "ValueError: boom"


def test_in_words(tmp_path):
    hung = Failure(1, "n2", 7, "no progress for 600 s in optimizer: x.py:3 f", reason="hung", log="logs/hang.txt")
    for failure, words in [
        (BOOM, "rank 3 (n2) failed at step 12: ValueError: boom; see logs/error_rank_00003.txt"),
        (hung, "rank 1 (n2) hung at step 7: no progress for 600 s in optimizer: x.py:3 f; see logs/hang.txt"),
        (
            killed(1, "n2", 7, -9),
            "rank 1 (n2) failed at step 7: the process was killed by SIGKILL, as happens when memory runs out",
        ),
        (killed(1, "n2", None, -11), "rank 1 (n2) failed: the process was killed by SIGSEGV"),
        (killed(1, "n2", None, 3), "rank 1 (n2) failed: the process ended with code 3"),
    ]:
        forget_outcome(tmp_path)
        assert in_words(write_failure(tmp_path, failure)[0]) == words
    assert in_words({"reason": "stopped", "step": 9, "cause": "SIGUSR1"}) == "stopped at step 9 (SIGUSR1)"
    assert in_words({"reason": "done", "step": 9}) == "was done at step 9"
    assert in_words({"reason": "failed", "error": "no good checkpoint left"}) == "failed: no good checkpoint left"
    assert in_words(None) == in_words({}) == "was killed, or its machine failed"
    assert in_words({"reason": "non-finite", "error": "step 3: loss nan"}).endswith("not finite: step 3: loss nan")
    assert in_words({"reason": "not saved", "error": "disk full"}).endswith("could not be saved: disk full")
