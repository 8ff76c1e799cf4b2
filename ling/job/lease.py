"""The lease on a run's folder: one job at a time writes to it, and a killed one does not block the next.

The holder's file `job/lease_N.json` says who it is and counts up while it lives. Whoever wants the folder takes the
next number N, which only one can create. A lease is free when its file is gone, when its process is (seen from the same
machine), when the same SLURM job has been started again, or when its counter has stood still for `STALE_AFTER_S` of the
observer's own time: clocks are never compared.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ling.config.errors import UserError
from ling.job.files import create_json, job_folder, machine_id, node_name, read_json, remove, replace_json

BEAT_S = 5.0
STALE_AFTER_S = 30.0
_NAME = re.compile(r"lease_(\d+)\.json")


def holder(run_dir: Path) -> dict[str, Any] | None:
    """What the newest lease on a run says: `job, node, pid, counter`, ...; None where nobody holds the folder."""
    files = _leases(run_dir)
    return read_json(files[max(files)]) if files else None


class Lease:
    """A lease that is held, with the thread that keeps it; made by `acquire`."""

    def __init__(self, path: Path, owner: dict[str, Any], lost: Callable[[str], None]) -> None:
        self.path = path
        self._owner = owner
        self._lost = lost
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ling-lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder free; it can be called twice."""
        if not self._released.is_set():
            self._released.set()
            self._thread.join()
            remove(self.path)

    def _keep(self) -> None:
        run_dir, mine = self.path.parent.parent, _number(self.path)
        while not self._released.wait(BEAT_S):
            files = _leases(run_dir)
            if files and max(files) > mine:
                new = read_json(files[max(files)]) or {}
                self._lost(f"{run_dir} has been taken over by {describe(new)}, which did not see this one alive")
                return
            try:
                replace_json(self.path, self._owner | {"counter": self._owner["counter"] + 1})
                self._owner["counter"] += 1
            except OSError:  # a full disk, or a file system that is away: the next beat may succeed
                continue


def acquire(run_dir: Path, say: Callable[[str], None] = print, lost: Callable[[str], None] | None = None) -> Lease:
    """Take the lease on a run's folder.

    Args:
        say: is given one line where it takes a while.
        lost: called from a thread when another job has taken the folder over; ends the process unless given.

    Raises:
        UserError: another job holds the folder, or takes it at the same moment.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    owner = _myself()
    before = _leases(run_dir)
    newest = max(before, default=0)
    while newest in before:
        found = read_json(before[newest])
        if found is None and before[newest].exists():
            break  # nothing of ours, or damaged: nobody keeps it
        if found is None or _is_free(before[newest], found, owner, say):
            break
        raise UserError(f"{run_dir} is in use by {describe(found)}; {_mend(found)}")
    path = job_folder(run_dir) / f"lease_{newest + 1}.json"
    if not create_json(path, owner):
        raise UserError(f"{run_dir} is being taken by another job at this moment; {_mend(read_json(path) or {})}")
    others = set(_leases(run_dir)) - set(before) - {newest + 1}
    if others:
        remove(path)
        raise UserError(f"{run_dir} is being taken by another job at this moment; start again if that one has ended")
    for old in before.values():
        remove(old)
    return Lease(path, owner, lost or _end_at_once)


def describe(lease: Mapping[str, Any]) -> str:
    """The holder of a lease in words."""
    job = f" ({lease['job']})" if lease.get("job") else ""
    return f"process {lease.get('pid', '?')} on {lease.get('node', '?')}{job}"


def _is_free(path: Path, found: dict[str, Any], owner: dict[str, Any], say: Callable[[str], None]) -> bool:
    if found.get("machine") == owner["machine"]:
        return _started(found.get("pid")) != found.get("pid_started")
    same_job = owner["job"] is not None and found.get("job") == owner["job"]
    if same_job and found.get("restart") != owner["restart"]:
        return True
    say(f"ling: {path.parent.parent} was left to {describe(found)}: seeing for {STALE_AFTER_S:g} s whether it lives")
    deadline = time.monotonic() + STALE_AFTER_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE_AFTER_S / 10))
        now = read_json(path)
        if now is None:  # released meanwhile
            return True
        if now.get("counter") != found.get("counter"):
            return False
    return True


def _mend(found: Mapping[str, Any]) -> str:
    job = str(found.get("job") or "")
    stop = f"scancel {job.removeprefix('SLURM job ')}" if job else f"kill {found.get('pid', 'PID')} on that machine"
    return f"wait for it, stop it ({stop}: it saves and ends), or give another run.dir"


def _myself() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "job": f"SLURM job {job}" if job else None,
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "node": node_name(),
        "machine": machine_id(),
        "pid": os.getpid(),
        "pid_started": _started(os.getpid()),
        "nonce": secrets.token_hex(8),
        "counter": 0,
    }


def _started(pid: Any) -> str | None:
    """When a process of this machine began, as the kernel counts; None where it is no more."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError, TypeError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _leases(run_dir: Path) -> dict[int, Path]:
    return {_number(path): path for path in job_folder(run_dir).glob("lease_*.json") if _NAME.fullmatch(path.name)}


def _number(path: Path) -> int:
    return int(path.name.removeprefix("lease_").removesuffix(".json"))


def _end_at_once(problem: str) -> None:
    print(f"ling: error: {problem}; stopping at once, nothing is saved", file=sys.stderr, flush=True)
    os._exit(1)
