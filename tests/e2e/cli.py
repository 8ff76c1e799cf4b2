"""`ling` as a process: `ling` forks one from a server that has imported torch already, `start` starts a real one."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).parent / "faults"
TIMEOUT_S = 180.0
FORKS = multiprocessing.get_context("forkserver")
# what importing takes seconds; nothing of it is changed by ling, or starts threads
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.checkpoint"])


class Done(NamedTuple):
    """What came of a command."""

    code: int | None
    out: str
    err: str


def ling(*argv: str, cwd: Path, fault: str = "") -> Done:
    """Run `ling ARGV` in a process of its own, in the folder `cwd`; with a `fault`, see `faults/sitecustomize.py`."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = FORKS.Process(target=_run, args=(argv, cwd, out, err, fault))
        process.start()
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
        return Done(process.exitcode, out.read_text(), err.read_text())


class Forked:
    """`ling ARGV` in a process of its own that is not waited for, as far as `subprocess.Popen` goes."""

    def __init__(self, *argv: str, cwd: Path) -> None:
        output = cwd / "forked.log"
        self._process = FORKS.Process(target=_run, args=(argv, cwd, output, output, ""))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.exitcode

    def communicate(self, timeout: float = TIMEOUT_S) -> None:
        """Wait for its end."""
        self._process.join(timeout)
        assert self._process.exitcode is not None

    @property
    def returncode(self) -> int | None:
        """The exit code; minus the signal's number after a signal."""
        return self._process.exitcode


def start(*argv: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `ling ARGV` as a user's shell does, with both outputs as pipes."""
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", None), str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "ling", *argv],
        cwd=cwd,
        env={**os.environ, **environment, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that `kill` reaches the processes that it has started
    )


def kill(process: subprocess.Popen[str]) -> None:
    """End what `start` started at once, it alone: nothing that it has started may go on and hold its outputs open."""
    process.kill()
    process.communicate(timeout=TIMEOUT_S)


def complete(process: subprocess.Popen[str]) -> Done:
    """Wait for what `start` started."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    return Done(process.returncode, out, err)


def _run(argv: tuple[str, ...], cwd: Path, out: Path, err: Path, fault: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.chdir(cwd)
    if fault:
        os.environ["LING_TEST_FAULT"] = fault
        runpy.run_path(str(FAULTS / "sitecustomize.py"))
    from ling.cli import main

    sys.exit(main(list(argv)))
