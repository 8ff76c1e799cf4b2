"""A thread per rank that ends the job when a rank has died or hangs, and says which one, at which step, and where.

Every second each rank tells its heartbeat, step and phase (`Board`). The job ends when
- a rank says that it has failed,
- the process of a rank on the same machine is gone,
- the heartbeat of a rank has been silent for a while (its machine is gone; rank 0 watches all, all watch rank 0),
- a rank has made no progress for `train.hang_timeout` (`SLOW_FACTOR` times that for the start, the first step, loading
  and saving): then all ranks write their stacks into `logs/` first, and those that wait for nobody are the suspects.
Only differences of a rank's own clock count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ling.job.board import Board, first_cause
from ling.job.files import machine_id
from ling.job.outcome import Failure, killed
from ling.job.progress import LOSS_SUM, Progress, where, write_stacks

SLOW_FACTOR = 3.0
_STDERR = 2


@dataclass(frozen=True)
class Timing:
    """Seconds between and after what; the tests use shorter ones."""

    beat: float = 1.0
    look_around: float = 5.0
    silent: float = 120.0
    collect: float = 10.0
    """How long a hang's first finder waits for the others' stacks."""
    grace: float = 5.0
    """How long a rank that hears of a failure waits for that rank to end by itself; three times that for the cause of a
    consequence, such as a rank that has been silent for twice that."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    rank: int
    world_size: int
    node: str
    local_ranks: range
    """The ranks on the same machine."""


class Watchdog:
    """Watches over the main thread of this rank and over the other ranks.

    Args:
        hang_timeout: seconds without progress; None: for ever.
        logs: folder for stacks.
        give_up: ends the process with this failure; called from the watchdog's thread, at most once.
    """

    def __init__(
        self,
        board: Board,
        progress: Progress,
        place: Place,
        hang_timeout: float | None,
        logs: Path,
        give_up: Callable[[Failure], None],
        timing: Timing | None = None,
    ) -> None:
        self.board, self.progress, self.place = board, progress, place
        self.rank, self.world_size, self.node = place.rank, place.world_size, place.node
        self.hang_timeout, self.logs, self.give_up, self.timing = hang_timeout, logs, give_up, timing or Timing()
        self.main_thread = threading.get_ident()
        self._stop = threading.Event()
        self._beats = 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._neighbours: dict[int, int] = {}
        self._moved = (-1, time.monotonic())
        self._looked = self._lost_board = time.monotonic()
        self._has_told = False
        self._thread = threading.Thread(target=self._watch, name="ling-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._tell_heartbeat()
        self._thread.start()

    def stop(self) -> None:
        """End watching: this rank has done its work. Tells the others first, who must not take it for dead."""
        if not self._stop.is_set():
            with contextlib.suppress(Exception):  # the store may be gone with a rank that has ended
                self.board.put(f"done/{self.rank}", True)
            self._stop.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def wait(self, seconds: float) -> None:
        """Leave it to the watchdog to find the cause of a failure and to end the process."""
        self._thread.join(seconds)

    def _watch(self) -> None:
        while not self._stop.wait(self.timing.beat):
            try:
                self._tell_heartbeat()
                failure = self._failed_rank() or self._dead_neighbour() or self._silent_rank() or self._hang()
                self._lost_board = time.monotonic()
            except Exception as error:  # the store's, whatever class it has: the machine of rank 0 is gone, or busy
                failure = self._gone_store(error)
            if failure is not None and not self._stop.is_set():
                self.give_up(failure)
                return

    def _tell_heartbeat(self) -> None:
        if self.hang_timeout is not None:  # against a thread that never gives up Python's lock: needs no lock itself
            seconds = SLOW_FACTOR * self.hang_timeout + self.timing.silent
            faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)
        self._beats += 1
        here = {"beat": self._beats, "step": self.progress.step, "phase": self.progress.phase}
        self.board.put(f"rank/{self.rank}", here | {"node": self.node, "pid": os.getpid(), "machine": machine_id()})

    def _failed_rank(self) -> Failure | None:
        if not self.board.failures():
            return None
        told, began = first_cause(self.board.failures()), time.monotonic()
        while not self._stop.wait(self.timing.grace / 10):
            is_cause = told is None or not told.is_consequence
            # a machine that is gone says nothing: it takes a while to miss it
            if time.monotonic() - began > (1 if is_cause else 3) * self.timing.grace:
                break
            if not is_cause:
                self._tell_heartbeat()  # the others wait here, too
                self._look_around()
                if dead := self._dead_neighbour() or self._silent(2 * self.timing.grace):
                    return dead
            told = first_cause(self.board.failures())
        return told

    def _dead_neighbour(self) -> Failure | None:
        dead = [rank for rank, pid in self._neighbours.items() if not _is_running(pid)]
        for rank in dead:
            if not self.board.get(f"done/{rank}"):
                told = first_cause(self.board.failures())  # it may have said why, just before
                return told if told is not None and not told.is_consequence else self._killed(rank)
        return None

    def _silent_rank(self) -> Failure | None:
        if time.monotonic() - self._looked < self.timing.look_around and self._seen:
            return None
        self._look_around()
        return self._silent(self.timing.silent)

    def _look_around(self) -> None:
        """See who has a heartbeat: rank 0 looks at all, the others at it and at those of their machine."""
        self._looked = now = time.monotonic()
        for rank in range(self.world_size) if self.rank == 0 else {0, *self.place.local_ranks}:
            told = self.board.get(f"rank/{rank}")
            if told is None or rank == self.rank:
                continue
            if told["machine"] == machine_id() and told["pid"] != os.getpid():
                self._neighbours[rank] = told["pid"]
            beat, since = self._seen.get(rank, (-1, now))
            self._seen[rank] = (told["beat"], now if told["beat"] != beat else since)

    def _silent(self, seconds: float) -> Failure | None:
        for rank, (_, since) in self._seen.items():
            if self._looked - since > seconds and not self.board.get(f"done/{rank}"):
                return self._killed(rank, f"no heartbeat for {seconds:g} s: its machine is gone or stands still")
        return None

    def _killed(self, rank: int, error: str | None = None) -> Failure:
        told = self.board.get(f"rank/{rank}") or {}
        step = max(told.get("step", 0), self.progress.step)  # what it told may be a second old
        failure = killed(rank, told.get("node", "?"), step)
        return failure if error is None else Failure(rank, failure.node, failure.step, error)

    def _hang(self) -> Failure | None:
        marks, since = self._moved
        if self.progress.marks != marks:
            self._moved = (self.progress.marks, time.monotonic())
        allowed = (self.hang_timeout or 0) * (SLOW_FACTOR if self.progress.is_slow else 1)
        is_hanging = self.hang_timeout is not None and self._moved[0] == marks and time.monotonic() - since > allowed
        if is_hanging and self.board.is_first("hang"):
            self.board.put("stacks", f"no progress for {allowed:g} s")
            self._tell_stack()
            return self._name_suspects(allowed)
        if self.board.get("stacks"):
            self._tell_stack()
        return None

    def _tell_stack(self) -> None:
        if not self._has_told:
            self._has_told = True
            title = f"rank {self.rank} ({self.node}), step {self.progress.step}, {self.progress.phase}"
            write_stacks(self.logs / f"stacks_rank_{self.rank:05d}.txt", title)
            place = {"step": self.progress.step, "phase": self.progress.phase, "node": self.node}
            self.board.put(f"stack/{self.rank}", place | where(self.main_thread))

    def _name_suspects(self, seconds: float) -> Failure:
        deadline = time.monotonic() + self.timing.collect
        told: dict[int, dict[str, Any]] = {}
        while len(told) < self.world_size and time.monotonic() < deadline and not self._stop.wait(self.timing.beat / 4):
            missing = (rank for rank in range(self.world_size) if rank not in told)
            told |= {rank: stack for rank in missing if (stack := self.board.get(f"stack/{rank}")) is not None}
        for rank in range(self.world_size):
            if rank not in told:
                last = self.board.get(f"rank/{rank}") or {}
                told[rank] = {"step": None, "phase": "?", "node": "?", "waiting": False} | last | {"place": "no answer"}
                if self.progress.step > (told[rank]["step"] or 0):  # its last word was of an earlier step
                    told[rank] |= {"step": self.progress.step, "phase": "an unknown phase"}
        suspects = suspects_of(told)
        lines = summary(told)
        self.logs.mkdir(parents=True, exist_ok=True)
        path = self.logs / "hang.txt"
        path.write_text("\n".join([f"no progress for {seconds:g} s", *lines, ""]))
        rank, at = suspects[0], told[suspects[0]]
        more = f" (and {len(suspects) - 1} more ranks)" if len(suspects) > 1 else ""
        error = f"no progress for {seconds:g} s in {at['phase']}{more}: {at['place']}"
        return Failure(rank, at["node"], at["step"], error, reason="hung", log=str(path))

    def _gone_store(self, error: Exception) -> Failure | None:
        if time.monotonic() - self._lost_board < min(self.timing.silent, self.hang_timeout or self.timing.silent):
            return None
        text = f"the job's store on the first machine does not answer ({type(error).__name__}): that machine is gone"
        return Failure(self.rank, self.node, self.progress.step, text, is_consequence=True)


def suspects_of(told: dict[int, dict[str, Any]]) -> list[int]:
    """The ranks that the others probably wait for: those without an answer, else those that wait for nobody, else those
    that are behind, else all."""
    silent = [rank for rank, at in told.items() if at["place"] == "no answer"]
    # a GPU's work is waited for where its results are read, in the sum of the losses
    busy = [rank for rank, at in told.items() if not at["waiting"] and at["phase"] != LOSS_SUM]
    busy = busy if len(busy) < len(told) else []
    least = min((at["step"] or 0 for at in told.values()), default=0)
    behind = [rank for rank, at in told.items() if (at["step"] or 0) == least]
    found = silent or busy or behind
    return sorted(found)


def summary(told: dict[int, dict[str, Any]]) -> list[str]:
    """Where the ranks stand, those at the same place in one line, the fewest first."""
    places: dict[tuple[Any, ...], list[int]] = {}
    for rank, at in told.items():
        places.setdefault((at["step"], at["phase"], at["place"]), []).append(rank)
    ordered = sorted(places.items(), key=lambda item: len(item[1]))
    return [f"{_ranks_in_words(ranks, told)}: step {step}, {phase}: {place}" for (step, phase, place), ranks in ordered]


def _ranks_in_words(ranks: list[int], told: dict[int, dict[str, Any]]) -> str:
    shown = ", ".join(f"{rank} ({told[rank]['node']})" for rank in sorted(ranks)[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"
