"""`ling train`: check everything, then run one rank here, or N through torchrun."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ling.commands import add_config_arguments, positive_int
from ling.config import Config, UserError, check_config, load_config
from ling.config.derived import run_dir
from ling.config.report import diff, save_config, shown

if TYPE_CHECKING:
    from ling.job.lease import Lease
    from ling.job.local_ranks import Ended
    from ling.job.signals import StopSignals
    from ling.platform import Platform

FREE_TO_CHANGE = (
    "parallel.",
    "checkpoint.",
    "observe.",
    "runtime.",
    "train.",
    "run.dir",
    "data.num_workers",
    "data.cache_dir",
    "data.max_epochs",
    "data.test",
    "launch.",
)
"""Settings that may differ when a run is resumed: they change neither the model nor the order of the data."""

NOT_FREE = ("train.global_batch_size", "train.rampup_batch_size")
PARTIAL = ".config.yaml.partial"
EARLY_STOP = 75


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling train`."""
    add_config_arguments(parser)
    parser.add_argument("--nproc", type=positive_int, default=1, metavar="N", help="local ranks to start (default 1)")


def run(args: argparse.Namespace) -> int:
    """Start or resume a run; the exit code is 0, 75 for a deliberate early stop, 1 for a failure."""
    started = time.monotonic()
    from ling.job.local_ranks import LAUNCHER, die_with_launcher
    from ling.job.signals import StopSignals
    from ling.parallel.groups import World, under_torchrun

    is_rank = under_torchrun()
    if is_rank and args.nproc > 1:
        raise UserError(
            "--nproc: torchrun has started this process already; give the number of ranks to torchrun alone"
        )
    if is_rank:
        die_with_launcher()
    elif args.nproc > 1:
        return _run_local_ranks(args)
    with StopSignals(speak=World.from_environment().is_main and LAUNCHER not in os.environ) as signals:
        config = load_config(args.config, args.overrides)
        platform = _check(config, World.from_environment().size)
        return _run_rank(config, platform, signals, started)


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
    from ling.platform.select import choose_for, precision_recipe

    platform = get_platform(config.runtime.platform)
    platform.start(World.from_environment().local_rank, config.runtime.num_threads)
    config.precision.recipe = precision_recipe(config.precision, platform)
    choose_for(config, platform.name)
    _check_loggers(config)
    from ling.commands.export import check_exports_of
    from ling.model.build import check_model_config

    check_model_config(config)
    check_exports_of(config, whole=True)
    return platform


def _check_loggers(config: Config) -> None:
    from ling.platform import optional

    observe = config.observe
    asked = {"tensorboard": (observe.tensorboard, "false"), "wandb": (observe.wandb != "disabled", "disabled")}
    for name, (wanted, off) in asked.items():
        problem = optional.find(name).problem if wanted else None
        if problem:
            raise UserError(f"observe.{name}: {name}: {problem}; pip install {name}, or set observe.{name}={off}")


def _claim_folder(config: Config) -> Lease:
    """Make the run's folder this job's, or see that it cannot be; the newest start's config is kept in it.

    Raises:
        UserError: the folder belongs to another run or is in use, holds something else, or cannot be written.
    """
    from ling.job.attempts import end_killed_attempt
    from ling.job.lease import acquire
    from ling.job.outcome import forget_outcome

    folder = run_dir(config)
    try:
        _check_folder(folder, config)
        lease = acquire(folder)
        try:
            _check_folder(folder, config)  # another job may have had it until now
            end_killed_attempt(folder)
            forget_outcome(folder)
            save_config(config, folder / PARTIAL)
            (folder / PARTIAL).rename(folder / "config.yaml")
        except BaseException:
            lease.release()
            raise
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): give another run.dir") from error
    return lease


def _check_folder(folder: Path, config: Config) -> None:
    """See that a run's folder is this run's, or free; writes nothing."""
    known = folder / "config.yaml"
    if known.is_file():
        _refuse_changes(folder, load_config(known), config)
    elif folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {PARTIAL, "job"}):
        raise UserError(f"{folder} is not empty and no run of ling: give another run.name or run.dir, or empty it")
    _check_checkpoint(folder, config)


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
    """See that the checkpoint which this start will begin with, the run's own or another's, fits this run's model."""
    from ling.checkpoint.start import check_start

    check_start(config, folder)


def _run_rank(config: Config, platform: Platform, signals: StopSignals, started: float) -> int:
    from ling.checkpoint.folder import newest
    from ling.checkpoint.manager import CheckpointError
    from ling.job.control import JobControl
    from ling.job.deadline import find_deadline
    from ling.job.rank import LAUNCHER, RankJob
    from ling.parallel.groups import World
    from ling.train import train
    from ling.trainer import NonFiniteError

    world, folder = World.from_environment(), run_dir(config)
    control = JobControl(signals, find_deadline(config.train.time_limit, started))
    job = RankJob(folder, world.rank, world.size, world.local_ranks, control)

    def claim() -> None:
        if LAUNCHER not in os.environ:
            job.lease = _claim_folder(config)

    try:
        trainer = train(config, platform, job, claim, started)
    except UserError as error:
        if job.is_noted and world.size > 1:  # on this rank only, perhaps
            return job.fail(error)
        job.end_badly({"reason": "failed", "error": str(error)})
        if world.is_main:
            raise
        return 2
    except (NonFiniteError, CheckpointError) as error:  # raised on all ranks at once
        if world.is_main:
            last = newest(folder)
            print(f"ling: error: {error}; the last good checkpoint is {last or 'none'}", file=sys.stderr, flush=True)
        reason = "non-finite" if isinstance(error, NonFiniteError) else "not saved"
        job.end_badly({"reason": reason, "step": job.control.progress.step, "error": str(error)})
        return 1
    except Exception as error:
        return job.fail(error)
    return EARLY_STOP if trainer.is_stopped and world.size == 1 else 0


def _run_local_ranks(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    _check(config, args.nproc)
    from ling.job.local_ranks import run_local_ranks

    lease = _claim_folder(config)
    try:
        ended = run_local_ranks(args.nproc, ["train", args.config, *args.overrides])
        return _exit_code(run_dir(config), ended)
    finally:
        lease.release()


def _exit_code(folder: Path, ended: Ended) -> int:
    """What became of the ranks, as an exit code and, after a failure, as the last line on the console."""
    from ling.checkpoint.folder import newest
    from ling.job.attempts import end_killed_attempt
    from ling.job.outcome import in_words, read_outcome, write_failure

    outcome = read_outcome(folder)
    if ended.failure is None and outcome is not None:
        return {"done": 0, "stopped": EARLY_STOP}.get(str(outcome.get("reason")), 1)
    if ended.failure is not None and not ended.is_interrupted:
        outcome, _ = write_failure(folder, ended.failure)
    end_killed_attempt(folder)
    if ended.is_interrupted:
        words, code = "interrupted at once, nothing was saved", 130
    else:
        words, code = in_words(outcome), 1
        if ended.failure is not None and outcome is not None and outcome["reason"] in ("done", "stopped"):
            words = f"the run {words}, but then {ended.failure.words()}"
    if outcome is None or outcome["reason"] not in ("non-finite", "not saved"):  # those have been said
        last = newest(folder)
        advice = f"the same command continues from {last}" if last else "there is no checkpoint yet"
        print(f"ling: error: {words}; {advice}", file=sys.stderr, flush=True)
    return code
