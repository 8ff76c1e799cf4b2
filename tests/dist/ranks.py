"""The ranks of the tests' worlds: processes that are started when first needed and serve the whole test run.

Starting a rank means importing torch and megatron-core, which takes seconds; joining a world takes milliseconds. So the
processes stay, and every call joins as many of them as it asks for to a new world.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 180.0
GRACE_S = 10.0
"""How long the other ranks may still take to answer when one has failed: they may wait for it in a collective."""


class RankError(AssertionError):
    """A function failed on a rank; the message has the traceback of each rank that failed."""


class Job(NamedTuple):
    """What a rank is asked to do: call `function` of `module` as rank `rank` of a world of `size`."""

    module: str
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rank: int
    size: int
    store: str


class Answer(NamedTuple):
    """What a rank answers: the function's result, or the traceback of its exception."""

    result: Any
    traceback: str | None


@dataclass
class _Process:
    process: subprocess.Popen
    channel: Connection
    log: Path

    @classmethod
    def start(cls, log: Path) -> _Process:
        ours, theirs = Pipe()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with open(log, "w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.dist.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        theirs.close()
        return cls(process, ours, log)

    def end(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-20:]
        return "\n".join(["its last output:", *lines]) if lines else "it printed nothing"


class Ranks:
    """Runs functions on the ranks of a world.

    Args:
        folder: for the processes' output and for the files through which the ranks of a world meet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[_Process] = []
        self._calls = 0
        self._started = 0

    def run(
        self, size: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S, **kwargs: Any
    ) -> list[Any]:
        """Call a function on every rank of a new world of `size` ranks, with torch.distributed connected.

        Args:
            function: a module's function; it is found by its name over there.
            args, kwargs: for the function, the same on every rank; they and the results are pickled.

        Returns:
            The results, by rank.

        Raises:
            RankError: the function raised on some rank, a rank died, or took longer than `timeout_s`.
        """
        self._calls += 1
        while len(self._processes) < size:
            self._processes.append(_Process.start(self._folder / f"process_{self._started}.log"))
            self._started += 1
        store = str(self._folder / f"store_{self._calls}")
        world = self._processes[:size]
        for rank, member in enumerate(world):
            job = Job(function.__module__, function.__qualname__, args, kwargs, rank, size, store)
            member.channel.send_bytes(pickle.dumps(job))
        answers, problems = self._collect(world, timeout_s)
        if problems:
            if size > 1 or not answers:  # ranks of a broken world may hang, or hold half of a collective
                self._end(size)
            raise RankError("\n".join(problems))
        return [answers[rank].result for rank in range(size)]

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        self._end(len(self._processes))

    def _end(self, count: int) -> None:
        """End the first so many processes."""
        for member in self._processes[:count]:
            member.end()
        del self._processes[:count]

    @staticmethod
    def _collect(world: list[_Process], timeout_s: float) -> tuple[dict[int, Answer], list[str]]:
        """Every rank's answer that came, and what went wrong, in the order in which it showed."""
        answers: dict[int, Answer] = {}
        problems: list[str] = []
        waiting = {member.channel: rank for rank, member in enumerate(world)}
        deadline = time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                problems += [f"rank {rank} of {len(world)} gave no answer in time" for rank in waiting.values()]
                break
            for channel in ready:
                rank = waiting.pop(channel)  # type: ignore[call-overload]
                try:
                    answers[rank] = pickle.loads(channel.recv_bytes())  # type: ignore[union-attr]
                    problem = answers[rank].traceback
                except (EOFError, ConnectionError):
                    problem = f"the process ended; {world[rank].last_words()}"
                if problem is not None:
                    problems.append(f"rank {rank} of {len(world)}: {problem}")
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers, problems
