"""N ranks on this machine through torchrun, in this process: their signals, their end, and what became of them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ling.job.files import node_name
from ling.job.outcome import Failure, killed
from ling.job.rank import LAUNCHER
from ling.job.signals import STOP_SIGNALS

SHUTDOWN_TIMEOUT_S = 60
"""How long torchrun waits for the other ranks when one has failed, before it kills them."""
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.2


@dataclass
class Ended:
    """What became of the ranks: the first failure, if there was one; the stop signals that came."""

    failure: Failure | None = None
    signals: list[str] = field(default_factory=list)

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C was pressed twice."""
        return self.signals.count("SIGINT") > 1


def die_with_launcher() -> None:
    """Have the system end this rank when the process that started it dies, however that happens: ranks without a
    launcher would train on unseen, and keep the next start out of the run's folder."""
    launcher = os.environ.get(LAUNCHER)
    # under a torchrun of someone else's there may be other machines, whose ranks go on: then save, and stop all of them
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if launcher else signal.SIGTERM)
    if launcher and os.getppid() != int(launcher):  # it died before this line
        os._exit(1)


def run_local_ranks(nproc: int, arguments: list[str]) -> Ended:
    """Run `python -m ling ARGUMENTS` as so many ranks and wait for them.

    Stop signals are passed on to the ranks, once they are ready to take them; a second SIGINT kills them.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    cores = len(os.sched_getaffinity(0))
    os.environ |= {LAUNCHER: str(os.getpid()), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_S)}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    args = torchrun.parse_args(["--standalone", f"--nproc-per-node={nproc}", "-m", "ling", *arguments])
    args.signals_to_handle = "SIGQUIT"  # the others are handled here
    ended = Ended()
    with _Forwarding(ended):
        try:
            torchrun.run(args)
        except ChildFailedError as error:
            ended.failure = _first_failure(error)
    return ended


def _first_failure(error: Any) -> Failure:
    """The rank that ended first by torchrun's account; one that a signal killed before those that ended with a code."""
    rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp, item[0]))
    return killed(rank, node_name(), None, failure.exitcode)


class _Forwarding:
    """Passes stop signals on to the ranks while it is entered."""

    def __init__(self, ended: Ended) -> None:
        self._ended = ended
        self._sent: set[tuple[int, str]] = set()
        self._over = threading.Event()
        self._before: dict[signal.Signals, Any] = {}
        self._thread = threading.Thread(target=self._forward, name="ling-signals", daemon=True)

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        is_new = name not in self._ended.signals
        if is_new or name == "SIGINT":
            self._ended.signals.append(name)
        if self._ended.is_interrupted:
            for pid in children_of(os.getpid()):
                _send(pid, signal.SIGKILL)
        elif is_new:  # the raw call: a handler may interrupt a print
            again = "; again: stop at once" if name == "SIGINT" else ""
            os.write(2, f"ling: {name}: finishing the step, then saving and stopping{again}\n".encode())

    def _forward(self) -> None:
        while not self._over.wait(_POLL_S):
            for name in dict.fromkeys(self._ended.signals):
                for pid in children_of(os.getpid()):
                    if (pid, name) not in self._sent and _takes_stop_signals(pid):
                        self._sent.add((pid, name))
                        _send(pid, signal.Signals[name])


def children_of(pid: int) -> list[int]:
    """The processes that a process has started: of `ling train --nproc`, the ranks."""
    pids: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids += [int(pid) for pid in path.read_text().split()]
        except OSError:  # the thread has ended
            continue
    return pids


def _takes_stop_signals(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1, as a rank has from its first moments on. Before, it would die."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        print(f"ling: rank process {pid} has ended already", file=sys.stderr, flush=True)
