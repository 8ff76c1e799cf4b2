"""Checks of one node by itself, without torch: GPUs, driver, clock, disk, the run's folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import ling
from ling.job.files import node_name

USED_GIB = 2.0
"""More memory than this in use: somebody else has the GPU."""
MIN_TEMPORARY_GB = 1.0
MIN_SHARED_MEMORY_GB = 0.5
_QUERY = ("index", "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")
_TIMEOUT_S = 60.0


def check_node(run_dir: Path | None, gpus: int | None, free_gb: float = 0.0) -> dict[str, Any]:
    """The report of this node: `node, problems, versions, gpus`, and with a run's folder `clock_s, free_gb`.

    Args:
        gpus: how many there must be; 0: none are looked for; None: those that there are.
        free_gb: space that the run's folder needs, in 10^9 bytes.
    """
    problems: list[str] = []
    report: dict[str, Any] = {"node": node_name(), "problems": problems, "versions": versions(), "gpus": []}
    if gpus != 0:
        report["gpus"] = _check_gpus(gpus, problems)
        if report["gpus"]:
            report["versions"]["driver"] = report["gpus"][0]["driver_version"]
    _check_space(Path(tempfile.gettempdir()), MIN_TEMPORARY_GB, problems)
    if gpus is not None and gpus > 1 and Path("/dev/shm").is_dir():
        _check_space(Path("/dev/shm"), MIN_SHARED_MEMORY_GB, problems)
    if run_dir is not None:
        report["clock_s"] = _check_folder(run_dir, problems)
        if run_dir.is_dir():
            report["free_gb"] = _check_space(run_dir, free_gb, problems)
    return report


def versions() -> dict[str, str]:
    """Versions that must be the same on all nodes, as far as they are known without importing anything."""
    found = {"python": platform.python_version(), "ling": ling.__version__}
    for name in ("torch", "megatron-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    kernel_driver = Path("/proc/driver/nvidia/version")
    if kernel_driver.is_file():
        found["kernel_driver"] = kernel_driver.read_text().splitlines()[0].strip()
    return found


def parse_gpus(text: str) -> list[dict[str, str]]:
    """The rows of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits`."""
    rows = ([cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip())
    return [dict(zip(_QUERY, row, strict=True)) for row in rows if len(row) == len(_QUERY)]


def gpu_problems(found: list[dict[str, str]], expected: int | None) -> list[str]:
    """What is wrong with a node's GPUs."""
    problems = []
    if expected is not None and len(found) < expected:
        problems.append(f"{len(found)} of {expected} GPUs are there")
    for gpu in found:
        used, errors = _number(gpu["memory.used"]) / 1024, _number(gpu["ecc.errors.uncorrected.volatile.total"])
        if used > USED_GIB:
            problems.append(f"GPU {gpu['index']} is not idle: {used:.1f} GiB are in use")
        if errors > 0:
            problems.append(f"GPU {gpu['index']} has {errors:.0f} uncorrected memory errors")
    return problems


def _number(text: str) -> float:
    """What nvidia-smi says, or 0 for `[N/A]`."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _check_gpus(expected: int | None, problems: list[str]) -> list[dict[str, str]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        if expected:
            problems.append(f"no nvidia-smi, where {expected} GPUs should be")
        return []
    except subprocess.TimeoutExpired:
        problems.append(f"nvidia-smi gave no answer in {_TIMEOUT_S:g} s")
        return []
    if done.returncode:
        problems.append(f"nvidia-smi failed: {' '.join((done.stderr or done.stdout).split())[:200]}")
        return []
    found = parse_gpus(done.stdout)
    problems += gpu_problems(found, expected)
    return found


def _check_space(folder: Path, needed_gb: float, problems: list[str]) -> float:
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed_gb:
        problems.append(f"{folder} has {free:.1f} GB left, {needed_gb:g} GB are needed")
    return round(free, 1)


def _check_folder(run_dir: Path, problems: list[str]) -> float:
    """See that the run's folder can be written and read; returns this node's clock minus the file system's."""
    probe = run_dir / "job" / f".probe.{node_name()}.{os.getpid()}"
    content = secrets.token_bytes(1 << 20)
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        before = time.time()
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        clock = (before + time.time()) / 2 - probe.stat().st_mtime
        if probe.read_bytes() != content:
            problems.append(f"{run_dir} gives back other bytes than were written")
        probe.unlink()
    except OSError as error:
        problems.append(f"{run_dir} cannot be written: {error.strerror}")
        return 0.0
    return round(clock, 3)
