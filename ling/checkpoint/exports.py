"""A run's exports to Hugging Face model directories while it trains. Torch-free.

An export is `ling export` in a process of its own on rank 0's machine, which reads a completed checkpoint from the
disk: training waits for no more than the start of that process. One runs at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ling
from ling.checkpoint.folder import checkpoints, set_aside
from ling.config import Config
from ling.config.schema import CheckpointConfig

FOLDER = "exports"
OF_RUN = "LING_EXPORT_OF_RUN"
"""Set for an export that a run has started: the number of the run's process."""
_NAME = re.compile(r"(\.?)step_(\d{8,})(\.partial)?")
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LING_LAUNCHER")
_PR_SET_PDEATHSIG = 1
_LOWEST_PRIORITY = 19
_FIRST_TO_GO = "900"
_TAIL_BYTES = 4000
_COMMAND = (sys.executable, "-m", "ling", "export")


def exports_run(settings: CheckpointConfig) -> bool:
    """Whether a run exports any of its checkpoints."""
    return settings.export_every is not None or settings.export_at_end


def is_wanted(config: Config, step: int) -> bool:
    """Whether a run exports its checkpoint of a step."""
    settings = config.checkpoint
    if settings.export_at_end and step == config.train.train_iters:
        return True
    return settings.export_every is not None and step % settings.export_every == 0


def export_folder(run_dir: Path, step: int) -> Path:
    """Where the export of a step stands."""
    return run_dir / FOLDER / f"step_{step:08d}"


def half_exported(run_dir: Path) -> set[int]:
    """Steps whose export has begun and is not complete; it may be going on in another process."""
    return {step for step, path in _folders(run_dir) if path.name.endswith(".partial")}


def _folders(run_dir: Path) -> Iterator[tuple[int, Path]]:
    """Exports, whole and half, with their steps."""
    for path in sorted((run_dir / FOLDER).glob("*step_*")):
        match = _NAME.fullmatch(path.name)
        if match and bool(match[1]) == bool(match[3]):
            yield int(match[2]), path


class _Running(NamedTuple):
    step: int
    process: subprocess.Popen[bytes]
    log: Path
    started: float


class Exports:
    """The exports of a run; made on rank 0 only, elsewhere `is_on` is false and nothing is ever done.

    Args:
        announce: takes each line that the user should read.
        log: takes records for the run's metrics.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        is_main: bool,
        announce: Callable[[str], None],
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        self._config, self._run_dir, self._announce, self._log = config, run_dir, announce, log
        self.is_on = is_main and exports_run(config.checkpoint)
        self._waiting: deque[tuple[int, Path]] = deque()
        self._running: _Running | None = None

    @property
    def pending(self) -> set[int]:
        """Steps whose checkpoints an export reads or is going to read; they must stay."""
        return {step for step, _ in self._waiting} | ({self._running.step} if self._running else set())

    def resume(self, step: int) -> None:
        """At the start of a run that goes on after `step`: begin with exports that are missing or half done.

        Exports of later steps are of a past that is done again. Whole ones are renamed, halves removed.
        """
        if not self.is_on:
            return
        found = dict(checkpoints(self._run_dir))
        try:
            for at, path in list(_folders(self._run_dir)):
                if path.name.startswith("."):
                    if at > step or at not in found:
                        shutil.rmtree(path)
                elif at > step:
                    self._announce(
                        f"{path} is of steps that are done again; kept as {set_aside(path, 'superseded').name}"
                    )
        except OSError as error:
            self._announce(f"warning: earlier exports could not be put in order: {error}")
        for at, folder in found.items():
            if at <= step and not export_folder(self._run_dir, at).exists():
                self.completed(at, folder)

    def completed(self, step: int, folder: Path) -> None:
        """A checkpoint is complete: begin to export it, where that is wanted, or after those that are under way."""
        if not (self.is_on and is_wanted(self._config, step)):
            return
        if self._running is not None:
            self._announce(f"the export of step {step} waits for that of step {self._running.step}")
        self._waiting.append((step, folder))
        self._start_next()

    def poll(self) -> None:
        """Report an export that has ended, and begin the next one. Call it after every step."""
        if self._running is None or self._running.process.poll() is None:
            return
        ended, self._running = self._running, None
        seconds = time.monotonic() - ended.started
        problem = None if ended.process.returncode == 0 else _reason(ended.process.returncode, ended.log)
        if problem is None:
            self._announce(f"exported {export_folder(self._run_dir, ended.step)} in the background, {seconds:.1f} s")
            self._log({"export": {"step": ended.step, "seconds": round(seconds, 3)}})
        else:
            self._report_failure(ended.step, f"{problem} (see {ended.log})")
        self._start_next()

    def wait(self, seconds: float) -> bool:
        """Wait so long for those under way; whether all are done."""
        if self._running is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running.process.wait(seconds)
            self.poll()
        return not self.pending

    def stop(self) -> None:
        """Leave what is under way to the run's next start, which goes on with the files that are finished."""
        steps = sorted(self.pending)
        if not steps:
            return
        self._waiting.clear()
        running, self._running = self._running, None
        if running is not None:
            running.process.terminate()
            running.process.wait()
        names = ", ".join(map(str, steps))
        self._announce(f"not exported yet: step {names}; the next start of the run does it")

    def _start_next(self) -> None:
        while self._waiting and self._running is None:
            step, folder = self._waiting.popleft()
            log = self._run_dir / "logs" / f"export_step_{step:08d}.txt"
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("ab") as output:
                    process = subprocess.Popen(
                        [*_COMMAND, str(folder), str(export_folder(self._run_dir, step)), "--workers", "1"],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        env=_environment(os.environ),
                        start_new_session=True,  # Ctrl-C is for the run, which decides what becomes of it
                    )
            except OSError as error:
                self._report_failure(step, f"it could not be started ({error})")
                continue
            self._running = _Running(step, process, log, time.monotonic())

    def _report_failure(self, step: int, problem: str) -> None:
        self._announce(f"warning: step {step} could not be exported: {problem}; training goes on")
        self._log({"export": {"step": step, "error": problem}})


def give_way() -> None:
    """In a process that a run has started for an export: let it have the machine, and end when it ends."""
    run = os.environ.get(OF_RUN)
    if run is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(run):  # it ended before this line
        os._exit(1)
    import psutil  # type: ignore[import-untyped]

    os.nice(_LOWEST_PRIORITY)
    with contextlib.suppress(OSError, psutil.Error):  # some containers forbid it
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    with contextlib.suppress(OSError):  # where memory runs out, this process is ended and no rank
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """That of a process which is no rank, runs this very `ling`, and leaves the GPUs and most of the cores alone."""
    kept = {
        key: value
        for key, value in environment.items()
        if key not in _OF_RANKS and not key.startswith(("TORCHELASTIC_", "TORCH_ELASTIC_", "GROUP_", "ROLE_"))
    }
    path = os.pathsep.join(filter(None, [str(Path(ling.__file__).parents[1]), environment.get("PYTHONPATH")]))
    return kept | {OF_RUN: str(os.getpid()), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _reason(code: int, log: Path) -> str:
    """Why an export has ended with a code that is not 0: its error message, or its last line."""
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    messages = [line for line in lines if line.startswith("ling: error: ")] or lines
    return messages[-1].removeprefix("ling: error: ") if messages else f"exit code {code}"
