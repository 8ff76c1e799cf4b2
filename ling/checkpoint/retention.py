"""Which checkpoints of a run stay, and how the others go. Torch-free."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from ling.checkpoint.folder import checkpoints, read_manifest

_LEFTOVERS = (".step_*.partial", ".step_*.removing")


def to_remove(steps: Sequence[int], keep_last: int | None, keep_every: int | None) -> list[int]:
    """Steps whose checkpoints are not to be kept.

    Args:
        steps: of the complete checkpoints, ascending.
        keep_last: so many of the newest stay (at least one does); None: all.
        keep_every: those at a multiple of so many steps stay for good; None: no others.
    """
    if keep_last is None:
        return []
    rest = steps[: -max(1, keep_last)]
    return [step for step in rest if not (keep_every and step % keep_every == 0)]


def retire(run_dir: Path, keep_last: int | None, keep_every: int | None, in_use: Collection[int] = ()) -> list[Path]:
    """Rename the checkpoints that need not be kept aside, once the newest is seen to be whole.

    Args:
        in_use: steps whose checkpoints are being read and stay for now.

    Returns:
        The folders' new names, for `remove`. Until then they can be renamed back.

    Raises:
        DamagedCheckpointError: the newest is not whole; nothing was renamed.
    """
    found = dict(checkpoints(run_dir))
    steps = [step for step in to_remove(list(found), keep_last, keep_every) if step not in in_use]
    if not steps:
        return []
    read_manifest(found[max(found)])
    return [found[step].rename(found[step].with_name(f".{found[step].name}.removing")) for step in steps]


def remove(folders: Sequence[Path]) -> None:
    """Delete retired checkpoints."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def leftovers(run_dir: Path) -> list[Path]:
    """What a process that was killed while it saved or removed has left behind."""
    return sorted(path for pattern in _LEFTOVERS for path in (run_dir / "checkpoints").glob(pattern))
