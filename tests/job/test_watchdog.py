"""The watchdog: a rank that hangs, dies or falls silent is named, and a rank that works is left alone.

Ranks are threads of the test here, with a store that they share; the time that the watchdog sees is short."""

import os
import subprocess
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from ling.job import watchdog as module
from ling.job.board import Board
from ling.job.outcome import Failure
from ling.job.progress import Progress, where, write_stacks
from ling.job.watchdog import Place, Timing, Watchdog, summary, suspects_of

TIMING = Timing(beat=0.02, look_around=0.05, silent=3600.0, collect=20.0, grace=0.3)
WAIT_S = 60.0


class Member:
    """A rank as a thread: a watchdog, and what it said when it gave up."""

    def __init__(self, board, rank, size, logs, hang_timeout=None, timing=TIMING, node=None):
        self.ended = threading.Event()
        self.failure: Failure | None = None
        self.progress = Progress()
        place = Place(rank, size, node or f"n{rank}", range(rank, rank + 1))
        self.watchdog = Watchdog(board, self.progress, place, hang_timeout, logs, self.give_up, timing)

    def give_up(self, failure):
        self.failure = failure
        self.watchdog.board.post_failure(failure)
        self.ended.set()

    def work(self, step, phase="optimizer"):
        self.progress.mark(phase, step)


@pytest.fixture
def world(tmp_path):
    """`world(3, ...)` gives the members of a world, whose watchdogs are stopped at the end."""
    made = []

    def make(size, **settings):
        board = Board(dist.HashStore())
        made.extend(Member(board, rank, size, tmp_path / "logs", **settings) for rank in range(size))
        for member in made:
            member.watchdog.start()
        return list(made)

    yield make
    for member in made:
        member.watchdog.stop()


def test_a_rank_that_stands_still_is_named_with_its_step_and_stack(world, tmp_path):
    members = world(3, hang_timeout=0.5)
    for member in members:
        member.work(6)
        member.work(7)
    here = threading.get_ident()
    for member in members:
        member.watchdog.main_thread = here
    assert all(member.ended.wait(WAIT_S) for member in members)
    failure = members[0].failure
    assert failure is not None
    assert all(member.failure == failure for member in members)
    assert (failure.reason, failure.step, failure.rank) == ("hung", 7, 0)
    assert failure.error.startswith("no progress for 0.5 s in optimizer (and 2 more ranks): ")
    text = (tmp_path / "logs" / "hang.txt").read_text()
    assert text.startswith("no progress for 0.5 s\nranks 0 (n0), 1 (n1), 2 (n2): step 7, optimizer: ")
    stacks = (tmp_path / "logs" / "stacks_rank_00002.txt").read_text()
    assert "rank 2 (n2), step 7, optimizer" in stacks
    assert "test_a_rank_that_stands_still" in stacks


def test_a_rank_that_does_not_answer_is_named_with_the_step_of_the_others(world, tmp_path):
    waiting, silent = world(2, hang_timeout=0.5, timing=replace(TIMING, collect=0.5))
    silent.work(1)
    while (silent.watchdog.board.get("rank/1") or {}).get("step") != 1:
        time.sleep(0.01)
    silent.watchdog._stop.set()  # stopped, or its machine stands still: no heartbeat and no stack any more
    for step in (1, 2, 3):
        waiting.work(step)
    assert waiting.ended.wait(WAIT_S)
    failure = waiting.failure
    assert (failure.reason, failure.rank, failure.step) == ("hung", 1, 3)
    assert failure.error == "no progress for 0.5 s in an unknown phase: no answer"
    assert "rank 1 (n1): step 3, an unknown phase: no answer" in (tmp_path / "logs" / "hang.txt").read_text()


def test_slow_phases_and_the_first_step_have_more_time():
    progress = Progress()
    assert progress.is_slow, "the start"
    progress.mark("forward and backward", 1)
    assert progress.is_slow, "the first step of an attempt"
    progress.mark("forward and backward", 2)
    assert not progress.is_slow
    progress.mark("saving", is_slow=True)
    assert progress.is_slow
    marks = progress.marks
    progress.tick()
    assert (progress.marks, progress.phase) == (marks + 1, "saving")


def test_a_rank_that_works_is_left_alone(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    member = Member(Board(dist.HashStore()), 0, 1, tmp_path, hang_timeout=10.0)
    for step in (1, 2, 3):
        member.work(step)
        assert member.watchdog._hang() is None
        now[0] += 9.0
        assert member.watchdog._hang() is None
    now[0] += 2.0
    assert member.watchdog._hang().reason == "hung"


def test_without_a_limit_nothing_hangs(world):
    (member,) = world(1, hang_timeout=None)
    member.watchdog._moved = (member.progress.marks, -1e9)
    assert member.watchdog._hang() is None


def test_a_failure_ends_the_others_and_the_cause_counts(world):
    members = world(2)
    board = members[0].watchdog.board
    board.post_failure(Failure(1, "n1", 4, "RuntimeError: Connection closed by peer", is_consequence=True))
    board.post_failure(Failure(0, "n0", 4, "ValueError: boom"))
    assert all(member.ended.wait(WAIT_S) for member in members)
    assert {member.failure.error for member in members} == {"ValueError: boom"}


def test_a_rank_that_falls_silent_is_named(world):
    members = world(2, timing=replace(TIMING, silent=0.5))
    members[1].work(9)
    members[1].watchdog._tell_heartbeat()
    members[1].watchdog._stop.set()  # its machine is gone: no heartbeat, and no word
    assert members[0].ended.wait(WAIT_S)
    failure = members[0].failure
    assert (failure.rank, failure.node, failure.step) == (1, "n1", 9)
    assert failure.error == "no heartbeat for 0.5 s: its machine is gone or stands still"


def test_a_rank_that_has_finished_is_not_taken_for_dead(world):
    members = world(2, timing=replace(TIMING, silent=0.3))
    members[1].watchdog.stop()
    assert not members[0].ended.wait(1.0)


def test_a_process_of_the_same_machine_that_is_gone_is_named_at_once(world):
    members = world(2)
    process = subprocess.Popen(["sleep", "600"])
    heartbeat = members[0].watchdog.board.get("rank/1") | {"pid": process.pid, "step": 3}
    members[1].watchdog._stop.set()
    members[1].watchdog._thread.join()
    members[0].watchdog.board.put("rank/1", heartbeat)
    while 1 not in members[0].watchdog._neighbours:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert members[0].ended.wait(WAIT_S)
    assert members[0].failure.rank == 1
    assert members[0].failure.error == "the process was killed by a signal, as happens when memory runs out"


def test_a_consequence_waits_for_the_dead_rank_that_is_its_cause(world):
    members = world(2)
    members[0].watchdog._neighbours[1] = gone_process()
    board = members[0].watchdog.board
    board.post_failure(Failure(0, "n0", 3, "RuntimeError: Connection closed by peer", is_consequence=True))
    assert members[0].ended.wait(WAIT_S)
    assert (members[0].failure.rank, members[0].failure.is_consequence) == (1, False)


def test_a_consequence_waits_for_the_machine_that_is_its_cause(world):
    """Rank 2's machine is gone: the others see their connections end, and miss its heartbeat only later."""
    members = world(3)
    members[2].work(9)
    members[2].watchdog._tell_heartbeat()
    members[2].watchdog._stop.set()
    board = members[0].watchdog.board
    board.post_failure(Failure(1, "n1", 9, "RuntimeError: Connection reset by peer", is_consequence=True))
    assert all(member.ended.wait(WAIT_S) for member in members[:2])
    for member in members[:2]:
        assert (member.failure.rank, member.failure.node, member.failure.step) == (2, "n2", 9)
        assert "its machine is gone or stands still" in member.failure.error


def test_a_consequence_without_a_cause_is_told(world):
    members = world(2)
    consequence = Failure(1, "n1", 9, "RuntimeError: Connection reset by peer", is_consequence=True)
    members[0].watchdog.board.post_failure(consequence)
    assert all(member.ended.wait(WAIT_S) for member in members)
    assert {member.failure for member in members} == {consequence}


def gone_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


class BrokenStore:
    def __getattr__(self, name):
        def fail(*args):
            raise dist.DistNetworkError("Broken pipe")

        return fail


def test_a_store_that_is_gone_ends_the_rank(tmp_path):
    member = Member(Board(dist.HashStore()), 1, 2, tmp_path, timing=replace(TIMING, silent=0.2))
    member.give_up = lambda failure: (setattr(member, "failure", failure), member.ended.set())
    member.watchdog.give_up = member.give_up
    member.watchdog.start()
    member.watchdog.board._store = BrokenStore()
    assert member.ended.wait(WAIT_S)
    assert "store on the first machine does not answer (DistNetworkError)" in member.failure.error
    member.watchdog.stop()


def at(step, place="a.py:1 f", waiting=True, node="n"):
    return {"step": step, "phase": "optimizer", "place": place, "waiting": waiting, "node": node}


def test_suspects():
    assert suspects_of({0: at(5), 1: at(5, waiting=False), 2: at(5)}) == [1], "the one that waits for nobody"
    assert suspects_of({0: at(5), 1: at(4), 2: at(5)}) == [1], "the one that is behind"
    assert suspects_of({0: at(5, waiting=False), 1: at(5, place="no answer")}) == [1], "the one that says nothing"
    assert suspects_of({0: at(5), 1: at(5)}) == [0, 1]
    reading = at(5, waiting=False) | {"phase": "sum of the losses"}
    assert suspects_of({0: reading, 1: at(5, waiting=False), 2: reading}) == [1], "a GPU is waited for in the sum"
    assert suspects_of({0: at(5, waiting=False), 1: at(4, waiting=False)}) == [1], "none waits: the one behind"


def test_the_summary_joins_ranks_at_one_place_the_fewest_first():
    told = {rank: at(5) for rank in range(12)} | {7: at(5, place="data.py:3 read", waiting=False)}
    first, second = summary(told)
    assert first == "rank 7 (n): step 5, optimizer: data.py:3 read"
    assert second.startswith("ranks 0 (n), 1 (n), 2 (n)")
    assert second.endswith("8 (n) and 3 more: step 5, optimizer: a.py:1 f")


def test_where_a_thread_stands(tmp_path):
    found = where()
    assert not found["waiting"]
    assert "test_watchdog.py" in found["place"] or "progress.py" in found["place"]
    write_stacks(tmp_path / "a" / "s.txt", "rank 0")
    write_stacks(tmp_path / "a" / "s.txt", "again")
    text = (tmp_path / "a" / "s.txt").read_text()
    assert text.index("rank 0\nthread") < text.index("again\nthread")
    assert where(-1) == {"place": "no stack", "waiting": False}


def test_processes():
    assert module._is_running(os.getpid())
    assert not module._is_running(gone_process())
