"""`ling train`: check everything, then run one rank here, or N through torchrun."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ling.commands import add_config_arguments, positive_int
from ling.config import Config, UserError, check_config, load_config
from ling.config.derived import run_dir
from ling.config.load import from_dict
from ling.config.report import diff, save_config, shown

if TYPE_CHECKING:
    from ling.platform import Platform

FREE_TO_CHANGE = (
    "parallel.",
    "checkpoint.",
    "observe.",
    "runtime.",
    "train.",
    "run.dir",
    "data.num_workers",
)
"""Settings that may differ when a run is resumed: they change neither the model nor the order of the data."""

NOT_FREE = ("train.global_batch_size",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling train`."""
    add_config_arguments(parser)
    parser.add_argument("--nproc", type=positive_int, default=1, metavar="N", help="local ranks to start (default 1)")


def run(args: argparse.Namespace) -> int:
    """Start or resume a run; the exit code is 0, 75 for a deliberate early stop, 1 for a failure."""
    from ling.parallel.groups import World, under_torchrun

    is_rank = under_torchrun()
    if is_rank and args.nproc > 1:
        raise UserError(
            "--nproc: torchrun has started this process already; give the number of ranks to torchrun alone"
        )
    world_size = World.from_environment().size if is_rank else args.nproc
    config = load_config(args.config, args.overrides)
    platform = _check(config, world_size)
    if is_rank or args.nproc == 1:
        return _run_rank(config, platform)
    _claim_folder(config)
    return _run_torchrun(args, run_dir(config))


def _check(config: Config, world_size: int) -> Platform:
    """Everything that can be checked before ranks are started; resolves `precision.recipe`.

    Raises:
        UserError: something does not fit.
    """
    check_config(config, world_size)
    from ling.data.datasets import check_data

    check_data(config)
    from ling.parallel.groups import World
    from ling.platform import get_platform
    from ling.platform.select import choose, precision_recipe

    platform = get_platform(config.runtime.platform)
    platform.start(World.from_environment().local_rank, config.runtime.num_threads)
    choose(config.runtime, platform.name)
    _check_loggers(config)
    config.precision.recipe = precision_recipe(config.precision, platform)
    from ling.model.build import check_model_config

    check_model_config(config)
    return platform


def _check_loggers(config: Config) -> None:
    from ling.platform import optional

    observe = config.observe
    asked = {"tensorboard": (observe.tensorboard, "false"), "wandb": (observe.wandb != "disabled", "disabled")}
    for name, (wanted, off) in asked.items():
        problem = optional.find(name).problem if wanted else None
        if problem:
            raise UserError(f"observe.{name}: {name}: {problem}; pip install {name}, or set observe.{name}={off}")


def _claim_folder(config: Config) -> None:
    """Make the run's folder this config's, or see that it already is; the newest start's config is kept in it.

    Raises:
        UserError: the folder belongs to another run, holds something else, or cannot be written.
    """
    folder = run_dir(config)
    known, partial = folder / "config.yaml", folder / ".config.yaml.partial"
    try:
        if known.is_file():
            _refuse_changes(folder, load_config(known), config)
            _check_checkpoint(folder, config)
        elif folder.exists() and (not folder.is_dir() or any(path != partial for path in folder.iterdir())):
            raise UserError(f"{folder} is not empty and no run of ling: give another run.name or run.dir, or empty it")
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, partial)
        partial.rename(known)
        _outcome_file(folder).unlink(missing_ok=True)  # of the attempt before
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): give another run.dir") from error


def _refuse_changes(folder: Path, old: Config, new: Config) -> None:
    allowed = new.train.allow_change
    changes = [
        (key, before, after)
        for key, before, after in diff(old, new)
        if not (key.startswith(FREE_TO_CHANGE) and key not in NOT_FREE)
        and key not in allowed
        and key.split(".")[0] not in allowed
    ]
    if changes:
        known = ", ".join(f"{key}={shown(before)} (now {shown(after)})" for key, before, after in changes)
        raise UserError(
            f"{folder} belongs to a run with {known}: give this run another run.name or run.dir, or allow the change "
            f"with train.allow_change=[{','.join(key for key, _, _ in changes)}]"
        )


def _check_checkpoint(folder: Path, config: Config) -> None:
    """See that the checkpoint which this start will resume from is whole, and loads on this layout."""
    from ling.checkpoint.folder import newest, read_manifest

    checkpoint = newest(folder)
    if checkpoint is None:
        return
    old, new = from_dict(read_manifest(checkpoint).config, str(checkpoint)).parallel, config.parallel
    if (old.expert_model_parallel_size > 1) != (new.expert_model_parallel_size > 1):
        raise UserError(
            f"{checkpoint} was saved with parallel.expert_model_parallel_size={old.expert_model_parallel_size}: the "
            "optimizer cannot go from expert parallelism to none or back yet; resume with "
            + ("more than 1" if old.expert_model_parallel_size > 1 else "1")
        )
    if old.use_distributed_optimizer != new.use_distributed_optimizer:
        was = shown(old.use_distributed_optimizer)
        raise UserError(
            f"{checkpoint} was saved with parallel.use_distributed_optimizer={was}, and loads with that only; set it so"
        )


def _run_rank(config: Config, platform: Platform) -> int:
    from ling.checkpoint.folder import newest
    from ling.parallel.groups import World
    from ling.train import train
    from ling.trainer import NonFiniteError

    is_main = World.from_environment().is_main
    if is_main:
        _claim_folder(config)
    try:
        trainer = train(config, platform)
    except NonFiniteError as error:
        if is_main:
            last = newest(run_dir(config))
            print(f"ling: error: {error}; the last good checkpoint is {last or 'none'}", file=sys.stderr, flush=True)
            _write_outcome(run_dir(config), {"reason": "non-finite", "error": str(error)})
        return 1
    if is_main:
        _write_outcome(run_dir(config), {"reason": "done", "step": trainer.step})
    return 0


def _run_torchrun(args: argparse.Namespace, folder: Path) -> int:
    cores = len(os.sched_getaffinity(0))
    environment = {"OMP_NUM_THREADS": str(max(1, cores // args.nproc)), **os.environ}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.nproc}"]
    code = subprocess.call([*command, "-m", "ling", "train", args.config, *args.overrides], env=environment)
    try:
        reason = json.loads(_outcome_file(folder).read_text())["reason"]
    except (OSError, ValueError, KeyError):
        return 1
    return {"done": 0, "stopped": 75}.get(reason, 1) if code == 0 else 1


def _outcome_file(folder: Path) -> Path:
    return folder / "job" / "outcome.json"


def _write_outcome(folder: Path, outcome: dict[str, object]) -> None:
    path = _outcome_file(folder)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(outcome) + "\n")
    partial.rename(path)
