"""The proof that a resumed run is the uninterrupted one: both are run as by a user, and compared from their files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ling.checkpoint.folder import newest, read_manifest
from ling.config.errors import UserError
from ling.job.attempts import read_attempts
from ling.job.local_ranks import children_of
from ling.observe.metrics import read_metrics

EXACT = ("step", "consumed_samples", "consumed_tokens", "data_crc32", "loss", "mtp_loss", "grad_norm", "lr", "eval")
"""What two equal runs have equal in their records; times and rates are never."""
_BATCH_BYTES = 1 << 28


@dataclass
class Verdict:
    """What a comparison has found.

    Attributes:
        claim: what is proved where nothing differs.
        compared: how many of what.
        difference: the first thing that differs, in words; None: nothing does.
    """

    claim: str
    compared: dict[str, int] = field(default_factory=dict)
    largest_deviation: float | None = None
    difference: str | None = None

    @property
    def is_proved(self) -> bool:
        """Whether nothing differs, and something was compared."""
        return self.difference is None and all(self.compared.values())

    def lines(self) -> list[str]:
        """What was compared, for people."""
        lines = [f"compared {', '.join(f'{count} {name}' for name, count in self.compared.items())}"]
        if self.largest_deviation is not None:
            lines.append(f"largest relative deviation of a loss: {self.largest_deviation:.1e}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def run_to_end(config: str, overrides: list[str], nproc: int, folder: Path) -> None:
    """Train until the run is done. Raises UserError, after the run's own output, when it is not."""
    process = _start(config, overrides, nproc, folder)
    _, output = process.communicate()
    if process.returncode != 0:
        print(output, end="", file=sys.stderr)
        raise UserError(f"the run in {folder} ended with code {process.returncode}, see above; mend that first")


def run_and_break(config: str, overrides: list[str], nproc: int, folder: Path, step: int, *, kill: bool) -> None:
    """Train to a step, then have the run stop (SIGTERM), or kill it (-9) once its checkpoint is behind it.

    Raises:
        UserError: the run failed, or was over before.
    """
    process = _start(config, overrides, nproc, folder)
    while process.poll() is None and max((record["step"] for record in read_metrics(folder)), default=0) < step + kill:
        time.sleep(0.005)
    ranks = children_of(process.pid) if nproc > 1 and kill else []
    if process.poll() is None:
        for pid in (process.pid, *ranks):
            os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
    _, output = process.communicate()
    if process.returncode == 0:
        raise UserError("the run was over before it could be interrupted; raise --steps, or lower --stop-at")
    if process.returncode not in (75, -signal.SIGKILL):
        print(output, end="", file=sys.stderr)
        raise UserError(f"the run in {folder} ended with code {process.returncode}, see above; mend that first")


def resumed_from(folder: Path) -> int:
    """The step from which a run's last attempt continued."""
    return read_attempts(folder)[-1]["resumed_from"]


def _start(config: str, overrides: list[str], nproc: int, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ling", "train", config, *overrides, f"run.dir={folder}", "--nproc", str(nproc)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def compare_exactly(whole: Path, resumed: Path) -> Verdict:
    """Compare two runs on one layout: records, and every tensor and object of their last checkpoints, bit by bit."""
    verdict = Verdict("the resumed run equals the uninterrupted one bit for bit")
    verdict.difference = _first_record(whole, resumed, verdict)
    ours, theirs = newest(resumed), newest(whole)
    if verdict.difference is None and (ours is None or theirs is None or ours.name != theirs.name):
        verdict.difference = f"the last checkpoint is {ours}, and {theirs} without a stop"
    elif verdict.difference is None and ours is not None and theirs is not None:
        verdict.difference = next(_checkpoint_differences(theirs, ours, verdict), None)
    return verdict


def compare_losses(whole: Path, resumed: Path, tolerance: float) -> Verdict:
    """Compare two runs of which the second went on on another layout: the data exactly, the losses within a relative
    tolerance."""
    stop_at = resumed_from(resumed)
    claim = f"resumed on another layout, every loss is that of the uninterrupted run within {tolerance:g} (relative)"
    verdict = Verdict(claim, {"losses": 0, "batches of data": 0}, 0.0)
    before, after = _by_step(whole), _by_step(resumed)
    if sorted(before) != sorted(after):
        verdict.difference = f"the steps are {sorted(after)}, and {sorted(before)} without a stop"
    for step in sorted(before) if verdict.difference is None else ():
        theirs, ours = before[step], after[step]
        deviation = abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"])
        verdict.largest_deviation = max(verdict.largest_deviation or 0.0, deviation)
        verdict.compared["losses"] += step > stop_at
        verdict.compared["batches of data"] += 1
        if ours["data_crc32"] != theirs["data_crc32"]:
            verdict.difference = f"step {step}: other data"
        elif deviation > tolerance:
            verdict.difference = f"step {step}: loss {ours['loss']!r}, and {theirs['loss']!r} without a stop"
        if verdict.difference is not None:
            break
    return verdict


def _by_step(folder: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in read_metrics(folder) if "loss" in record}


def _first_record(whole: Path, resumed: Path, verdict: Verdict) -> str | None:
    theirs, ours = read_metrics(whole), read_metrics(resumed)
    verdict.compared["records"] = len(theirs)
    for number, (one, other) in enumerate(zip(theirs, ours, strict=False)):
        for key in EXACT:
            if repr(one.get(key)) != repr(other.get(key)):  # repr: nan is equal to nan, and -0.0 is not 0.0
                where = f"step {one.get('step')}" if one.get("step") == other.get("step") else f"record {number + 1}"
                return f"{where}: {key} {other.get(key)!r}, and {one.get(key)!r} without a stop"
    return None if len(theirs) == len(ours) else f"{len(ours)} records, and {len(theirs)} without a stop"


def _checkpoint_differences(whole: Path, resumed: Path, verdict: Verdict) -> Iterator[str]:
    """What differs between two checkpoints, in the order of the names."""
    import torch

    one, other = read_manifest(whole), read_manifest(resumed)
    for name in ("step", "consumed_samples", "loss", "optimizer_step", "random_states"):
        if getattr(one, name) != getattr(other, name):
            yield f"{name} {getattr(other, name)}, and {getattr(one, name)} without a stop"
    names = sorted(_entries(whole))
    if names != sorted(_entries(resumed)):
        yield f"the checkpoints hold other tensors: {sorted(set(names) ^ set(_entries(resumed)))[:3]}"
        return
    verdict.compared["tensors"] = 0
    for (name, ours), (_, theirs) in zip(_contents(resumed), _contents(whole), strict=True):
        is_tensor = torch.is_tensor(ours)
        kind = "tensors" if is_tensor else "objects"
        verdict.compared[kind] = verdict.compared.get(kind, 0) + 1
        if not _is_same(ours, theirs):
            at = f" (first at element {_first_element(ours, theirs)})" if is_tensor else ""
            yield f"{name}{at}"
    for name in sorted(name for name in one.files if name.startswith("random_")):
        verdict.compared["random states"] = verdict.compared.get("random states", 0) + 1
        if other.files.get(name) != one.files[name]:
            yield f"random states in {name}"


def _entries(checkpoint: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(checkpoint).read_metadata().state_dict_metadata


def _contents(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    """Every whole tensor and object of a checkpoint by name, in the order of the names; a part of it at a time."""
    import torch
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    def load(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks that this is one process
            dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
        yield from state.items()

    batch: dict[str, Any] = {}
    filled = 0
    for name, entry in sorted(_entries(checkpoint).items()):
        if isinstance(entry, TensorStorageMetadata):
            batch[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
            filled += batch[name].nbytes
        else:
            batch[name] = None
        if filled > _BATCH_BYTES:
            yield from load(batch)
            batch, filled = {}, 0
    yield from load(batch)


def _is_same(ours: Any, theirs: Any) -> bool:
    import torch

    if torch.is_tensor(ours) and torch.is_tensor(theirs):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(_bits(ours), _bits(theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_is_same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(_is_same, ours, theirs))
    return type(ours) is type(theirs) and (ours == theirs or _raw(ours) == _raw(theirs) is not None)


def _raw(value: Any) -> bytes | None:
    return value.getvalue() if hasattr(value, "getvalue") else None


def _bits(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _first_element(ours: Any, theirs: Any) -> list[int]:
    import torch

    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return []
    differs = (_bits(ours) != _bits(theirs)).view(ours.numel(), -1).any(-1)
    flat = int(differs.nonzero()[0])
    return [int(index) for index in torch.unravel_index(torch.tensor(flat), ours.shape)]
