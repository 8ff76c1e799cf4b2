"""The job as one rank runs it: its attempt and watchdog, and what it leaves behind when it ends, well or not."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from ling.config.errors import UserError
from ling.job.attempts import Attempt
from ling.job.board import Board
from ling.job.control import TIME_LIMIT, JobControl
from ling.job.files import node_name
from ling.job.lease import Lease
from ling.job.outcome import Failure, failure_of, in_words, write_failure, write_outcome
from ling.job.watchdog import Place, Watchdog

LAUNCHER = "LING_LAUNCHER"
"""Set for ranks that `ling train --nproc` has started: it holds the lease, and has the last word on the console."""
CAUSE_TIMEOUT_S = 60.0


class RankJob:
    """The job of this rank. `lease` and `attempt` are set on rank 0, once the run's folder is its own."""

    def __init__(self, run_dir: Path, rank: int, world_size: int, local_ranks: range, control: JobControl) -> None:
        self.run_dir, self.control = run_dir, control
        self.place = Place(rank, world_size, node_name(), local_ranks)
        self.is_claimed = LAUNCHER in os.environ
        """Whether the run's folder is this job's; before, nothing may be written there."""
        self.attempt: Attempt | None = None
        self.lease: Lease | None = None
        self.board: Board | None = None
        self._watchdog: Watchdog | None = None
        self._failure: Failure | None = None
        self._ending = threading.Lock()

    @property
    def logs(self) -> Path:
        """Folder of what ranks have to say of a failure."""
        return self.run_dir / "logs"

    @property
    def is_noted(self) -> bool:
        """Whether the other ranks have been told of an error of this one."""
        return self._failure is not None

    def watch(self, board: Board, hang_timeout: float | None) -> None:
        """Start the watchdog."""
        self.board = board
        self._watchdog = Watchdog(board, self.control.progress, self.place, hang_timeout, self.logs, self._give_up)
        self._watchdog.start()

    def end(self, reason: str, step: int, checkpoint: Path | None = None) -> None:
        """The work is `done`, or `stopped` on purpose; the other ranks have come as far. Rank 0 says so."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self.place.rank:
            return
        outcome: dict[str, Any] = {"reason": reason, "step": step}
        if reason == "stopped":
            cause, source = self.control.cause, self.control.deadline.source
            outcome["signal"] = cause if cause != TIME_LIMIT else None
            outcome["cause"] = f"{cause}: {source}" if cause == TIME_LIMIT and source else cause
            outcome["checkpoint"] = str(checkpoint)
            print(f"ling: {in_words(outcome)}, saved {checkpoint}; the same command resumes", flush=True)
        if self.attempt is not None:
            self.attempt.end(outcome, step)
        else:
            print(f"ling: nothing was left to do at step {step}; raise train.train_iters to go on", flush=True)
        write_outcome(self.run_dir, outcome)
        if self.lease is not None:
            self.lease.release()

    def end_badly(self, outcome: dict[str, Any]) -> None:
        """The run cannot go on, all ranks know it and end by themselves. Rank 0 says so."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self.place.rank == 0 and self.is_claimed:
            write_outcome(self.run_dir, outcome)
            if self.attempt is not None:
                self.attempt.end(outcome, self.control.progress.step)
        if self.lease is not None:
            self.lease.release()

    def note(self, error: BaseException) -> Failure:
        """Tell the other ranks of an error at once, before anything is cleaned up; a second call changes nothing."""
        if self._failure is None:
            step = self.control.progress.step
            failure = failure_of(error, self.place.rank, self.place.node, step)
            log = self._write_log(error, step) if self.is_claimed else None
            self._failure = replace(failure, log=log)
            if self.board is not None:
                with contextlib.suppress(Exception):  # the store may be gone: that may be the very failure
                    self.board.post_failure(self._failure)
        return self._failure

    def _write_log(self, error: BaseException, step: int) -> str | None:
        path = self.logs / f"error_rank_{self.place.rank:05d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"step {step}, {self.control.progress.phase}\n")
                traceback.print_exception(error, file=file)
        except OSError:  # a full disk must not hide the error itself
            return None
        return str(path)

    def fail(self, error: Exception) -> int:
        """Report an error that ends this rank; returns the exit code of a world of one, else ends the process.

        Where the error is but a consequence, the watchdog is given time to find the cause.
        """
        failure = self.note(error)
        if self.place.world_size == 1:
            if self._watchdog is not None:
                self._watchdog.stop()
            traceback.print_exception(error)
            self._report(failure)
            if self.lease is not None:
                self.lease.release()
            return 1
        if not failure.is_consequence:
            if not isinstance(error, UserError):  # that one says all there is to say
                traceback.print_exception(error)
        elif self._watchdog is not None:
            self._watchdog.wait(CAUSE_TIMEOUT_S)
        self._give_up(failure)
        return 1

    def _give_up(self, failure: Failure) -> None:
        """End this process: other ranks hang or are gone, so nothing can be closed in order."""
        with self._ending:  # the main thread and the watchdog's may both come here; the first one ends the process
            with contextlib.suppress(Exception):  # the store may be gone
                if self.board is not None and failure not in self.board.failures():
                    self.board.post_failure(failure)
            with contextlib.suppress(OSError):  # a full disk: the process must end all the same
                self._report(failure)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _report(self, failure: Failure) -> None:
        if not self.is_claimed:
            print(f"ling: error: {failure.words()}", file=sys.stderr, flush=True)
            return
        outcome, is_first = write_failure(self.run_dir, failure)
        if self.attempt is not None:
            self.attempt.end(outcome, self.control.progress.step)
        if is_first and LAUNCHER not in os.environ:
            print(f"ling: error: {in_words(outcome)}", file=sys.stderr, flush=True)
