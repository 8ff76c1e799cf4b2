"""The cluster of the tests, and what a test asks of its jobs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ling.observe.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
PATIENCE_S = 400.0
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


class Cluster:
    """A SLURM of nodes n1 to n5, whose files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def up(self) -> str | None:
        """Start it; or say why SLURM cannot be run here."""
        done = self._script("up", check=False)
        if done.returncode == 3:
            return done.stderr.strip().splitlines()[-1]
        assert done.returncode == 0, done.stderr
        return None

    def down(self) -> None:
        """Stop it."""
        self._script("down")

    def crash(self, node: str) -> None:
        """The node is gone at once."""
        self._script("crash", node)

    def start(self, node: str) -> None:
        """The node comes back."""
        self._script("start", node)

    def make_read_only(self, node: str, folder: Path) -> None:
        """The node can no longer write to a folder."""
        self._script("enter", node, "mount", "--bind", str(folder), str(folder))
        self._script("enter", node, "mount", "-o", "remount,ro,bind", str(folder))

    def undo_read_only(self, node: str, folder: Path) -> None:
        """It can again."""
        self._script("enter", node, "umount", str(folder))

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a command as a user of the cluster does; its output."""
        line = f". {self.folder}/env && {shlex.join(command)}"
        path = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)])),
        }
        done = subprocess.run(
            ["bash", "-c", line], cwd=cwd, env={**os.environ, **path, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, ..."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", job)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def _script(self, action: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(SCRIPT), action, str(self.folder), *arguments]
        return subprocess.run(command, check=check, capture_output=True, text=True)


class Job:
    """A run that `ling launch slurm` has submitted."""

    def __init__(self, cluster: Cluster, number: str, run_dir: Path) -> None:
        self.cluster, self.number, self.run_dir = cluster, number, run_dir

    @property
    def output(self) -> str:
        """What the job has printed so far."""
        path = self.run_dir / "job" / f"slurm-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def losses(self) -> dict[int, float]:
        """The loss of every step that counts."""
        return {record["step"]: record["loss"] for record in read_metrics(self.run_dir) if "loss" in record}

    def attempts(self) -> list[dict[str, Any]]:
        """How the attempts have ended."""
        path = self.run_dir / "job" / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def status(self) -> dict[str, Any]:
        """What `ling status` says."""
        return json.loads(self.cluster.run("python", "-m", "ling", "status", str(self.run_dir), "--json"))

    def starts(self) -> list[dict[str, Any]]:
        """How often the job file has been started."""
        path = self.run_dir / "job" / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, *states: str) -> str:
        """Wait until the job is in one of these states; it must not end in another one."""

        def has_ended() -> bool:
            state = self.cluster.state(self.number)
            assert state in states or state not in FINAL, f"the job is {state}:\n{self.output}"
            return state in states

        self.wait_until(has_ended, " or ".join(states))
        return self.cluster.state(self.number)

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has made a step."""
        self.wait_until(lambda: max(self.losses(), default=0) >= step, f"step {step}")

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for something, with much patience."""
        end = time.monotonic() + PATIENCE_S
        while not is_so():
            state = self.cluster.state(self.number)
            is_over = time.monotonic() > end or (state in FINAL and not is_so())
            assert not is_over, f"not {what}; the job is {state}:\n{self.output}"
            time.sleep(0.2)
