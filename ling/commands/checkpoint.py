"""`ling checkpoint`: list the checkpoints of a run, verify, prune and merge them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ling.commands import positive_int
from ling.config import UserError

if TYPE_CHECKING:
    from ling.checkpoint.folder import Manifest

DAMAGED = 1
"""Exit code of `verify` where the command worked and the checkpoint is no good; 2 is for what is no checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling checkpoint`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("list", help="step, size, layout, loss and age of a run's checkpoints")
    show.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    show.add_argument("--json", action="store_true", help="print JSON")

    verify = actions.add_parser("verify", help="compare every file with its checksum; code 1 if one is damaged")
    verify.add_argument("checkpoint", metavar="CKPT", type=Path, help="a checkpoint, or a run's folder (its newest)")

    prune = actions.add_parser("prune", help="remove older checkpoints of a run, once the newest is verified")
    prune.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    prune.add_argument("--keep-last", type=positive_int, required=True, metavar="K", help="keep the K newest")
    prune.add_argument("--keep-every", type=positive_int, metavar="J", help="keep those at a multiple of J steps, too")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")

    merge = actions.add_parser("merge", help="average the weights of checkpoints")
    merge.add_argument("checkpoints", nargs="+", metavar="CKPT", type=Path, help="two checkpoints or more")
    merge.add_argument("--output", required=True, metavar="DIR", type=Path, help="folder of the merged checkpoint")
    how = merge.add_mutually_exclusive_group()
    how.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each checkpoint; they sum to 1")
    how.add_argument(
        "--schedule",
        choices=("linear", "cosine", "1-sqrt", "mean"),
        default="linear",
        help="learning-rate decay that the merge stands for (default linear)",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    try:
        return {"list": _list, "verify": _verify, "prune": _prune, "merge": _merge}[args.action](args)
    except OSError as error:
        place = next(getattr(args, name) for name in ("output", "run", "checkpoint") if hasattr(args, name))
        raise UserError(f"{error.filename or place}: {error.strerror}; see to that disk, and start again") from error


def _list(args: argparse.Namespace) -> int:
    from ling.checkpoint.folder import damaged_folders, step_folders

    rows = [_row(step, path) for step, path in step_folders(_run_of(args.run))]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    if aside := damaged_folders(args.run):
        print(f"set aside as damaged: {', '.join(path.name for path in aside)}")
    if not rows:
        print(f"{args.run} has no {'good checkpoint left' if aside else 'checkpoints yet'}")
        return 0
    lines = [["step", "size", "layout", "loss", "age", "state"]]
    for row in rows:
        loss = f"{row['loss']:.4f}" if row["loss"] is not None else "-"
        age = _age(time.time() - row["saved_at"]) if row["saved_at"] is not None else "-"
        lines.append(
            [str(row["step"]), _size(row["bytes"]), row["layout"] or "-", loss, age, row["problem"] or "complete"]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    for line in lines:
        print("  ".join([*(text.rjust(width) for text, width in zip(line, widths, strict=False)), line[5]]))
    return 0


def _row(step: int, path: Path) -> dict[str, Any]:
    from ling.checkpoint.folder import find_damage, read_manifest

    row: dict[str, Any] = {"step": step, "path": str(path), "problem": None}
    row |= dict.fromkeys(("bytes", "layout", "world_size", "loss", "consumed_samples", "saved_at"))
    row["has_optimizer"] = None
    try:
        manifest = read_manifest(path, "never")
    except UserError as error:
        return row | {"problem": getattr(error, "problem", str(error))}
    row["problem"] = find_damage(path, manifest, manifest.files, checksums=False)
    row |= {name: getattr(manifest, name) for name in ("world_size", "loss", "consumed_samples", "saved_at", "bytes")}
    return row | {"layout": _layout(manifest), "has_optimizer": manifest.optimizer_step is not None}


def _layout(manifest: Manifest) -> str:
    parallel = manifest.config.get("parallel", {})
    keys = {
        "TP": "tensor_model_parallel_size",
        "PP": "pipeline_model_parallel_size",
        "EP": "expert_model_parallel_size",
    }
    sizes = [f"{name}{parallel[key]}" for name, key in keys.items() if parallel.get(key, 1) > 1]
    ranks = f"{manifest.world_size} rank{'s' * (manifest.world_size != 1)}"
    return " ".join([*sizes, ranks]) if manifest.merged is None else f"merge of {len(manifest.merged)}"


def _verify(args: argparse.Namespace) -> int:
    from ling.checkpoint.folder import DamagedCheckpointError, find_damage, read_manifest, resolve

    folder = resolve(args.checkpoint) if not (args.checkpoint / ".metadata").is_file() else args.checkpoint
    try:
        manifest = read_manifest(folder, "never")
    except DamagedCheckpointError as error:
        print(f"ling: {error}", file=sys.stderr)
        return DAMAGED
    done, damaged, progress = 0, 0, _Progress(manifest.bytes)
    for name, record in sorted(manifest.files.items()):
        problem = find_damage(folder, manifest, [name], checksums=True)
        done += record.bytes
        progress.show(done)
        if problem:
            damaged += 1
            progress.clear()
            print(f"damaged: {problem}", flush=True)
    progress.clear()
    without = sum(record.crc32 is None for record in manifest.files.values())
    note = f"; {without} have no checksum in its format, only a size" if without else ""
    verdict = (
        f"{damaged} of {len(manifest.files)} files are damaged" if damaged else f"{len(manifest.files)} files are whole"
    )
    print(f"{folder} (step {manifest.step}, {_size(manifest.bytes)}): {verdict}{note}")
    return DAMAGED if damaged else 0


def _prune(args: argparse.Namespace) -> int:
    from ling.checkpoint.exports import half_exported
    from ling.checkpoint.folder import checkpoints, read_manifest
    from ling.checkpoint.retention import remove, retire, to_remove

    run = _run_of(args.run)
    found, in_use = dict(checkpoints(run)), half_exported(run)
    steps = [step for step in to_remove(list(found), args.keep_last, args.keep_every) if step not in in_use]
    if not steps:
        print(f"{run}: nothing to remove, {len(found)} checkpoints stay")
        return 0
    names = ", ".join(found[step].name for step in steps)
    if args.dry_run:
        print(f"{run}: would remove {len(steps)} of {len(found)} checkpoints: {names}")
        return 0
    read_manifest(found[max(found)], "always")
    remove(retire(run, args.keep_last, args.keep_every, in_use))
    print(f"{run}: removed {len(steps)} of {len(found)} checkpoints: {names}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from ling.checkpoint.folder import read_manifest, resolve
    from ling.checkpoint.merge import merge, weights_of_schedule

    folders = [resolve(path) for path in args.checkpoints]
    weights = args.weights
    if weights is None:
        folders.sort(key=lambda folder: read_manifest(folder).step)
        weights = weights_of_schedule([read_manifest(folder).step for folder in folders], args.schedule)
    progress = _Progress()
    manifest = merge(folders, weights, args.output, progress.show)
    progress.clear()
    for source in manifest.merged or []:
        print(f"  {source['weight']:.6f}  {source['checkpoint']} (step {source['step']})")
    print(f"merged into {args.output} ({_size(manifest.bytes)}, weights only)")
    return 0


def _run_of(path: Path) -> Path:
    if not (path / "checkpoints").is_dir():
        raise UserError(f"{path} is no run's folder: it has no checkpoints/; name a folder like runs/base")
    return path


class _Progress:
    """A line with part, rate and time left, on a terminal."""

    def __init__(self, total: int = 0) -> None:
        self._total, self._start, self._is_on = total, time.monotonic(), sys.stderr.isatty()

    def show(self, done: int, total: int | None = None) -> None:
        """So many bytes are done."""
        total = total or self._total
        seconds = time.monotonic() - self._start
        if self._is_on and done:
            left = seconds * (total - done) / done
            rate = _size(int(done / max(seconds, 1e-9)))
            text = f"{done / max(1, total):4.0%} of {_size(total)}, {rate}/s, {_age(left)} left"
            print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for another line."""
        if self._is_on:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
