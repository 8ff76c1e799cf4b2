"""`ling prove-resume`: run a training without a stop, and again with one; compare the two in everything."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from ling.commands import add_config_arguments, positive_int
from ling.config import Config, UserError, check_config, load_config
from ling.job.proof import Verdict, compare_exactly, compare_losses, resumed_from, run_and_break, run_to_end

LOSS_TOLERANCE = 1e-5
"""Relative; for a resume on another layout, which adds up in another order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling prove-resume`."""
    add_config_arguments(parser)
    parser.add_argument("--steps", type=positive_int, default=8, metavar="N", help="steps of the whole run (default 8)")
    parser.add_argument(
        "--stop-at", type=positive_int, metavar="K", help="step at which it is interrupted (default: half of them)"
    )
    parser.add_argument("--nproc", type=positive_int, default=1, metavar="N", help="local ranks (default 1)")
    parser.add_argument(
        "--kill", action="store_true", help="kill it (-9) after the checkpoint of that step, instead of stopping it"
    )
    parser.add_argument(
        "--then",
        action="extend",
        nargs="+",
        default=[],
        metavar="a.b=c",
        help="resume with these: another layout, mostly",
    )
    parser.add_argument("--then-nproc", type=positive_int, metavar="M", help="resume on so many ranks")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="where the runs go (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="the verdict as JSON")


def _schedule(config: Config, steps: int) -> list[str]:
    """The first steps of the run's own learning rates; a warm-up that is longer is shortened, since it must fit."""
    end = config.optim.lr_decay_iters or config.train.train_iters
    return [f"optim.lr_warmup_iters={min(config.optim.lr_warmup_iters, steps)}", f"optim.lr_decay_iters={end}"]


def run(args: argparse.Namespace) -> int:
    """Prove it; 0: proved, 1: not."""
    stop_at = args.stop_at or max(1, args.steps // 2)
    if stop_at >= args.steps:
        raise UserError(f"--stop-at: {stop_at} is not before the end of the run ({args.steps}); give --steps more")
    settings = [*args.overrides, f"train.train_iters={args.steps}", "observe.tensorboard=false"]
    settings += ["observe.wandb=disabled", "checkpoint.keep_last=null", "train.time_limit=null"]
    settings += ["checkpoint.export_every=null", "checkpoint.export_at_end=false"]
    settings += [
        f"checkpoint.save_interval={stop_at}",
        *_schedule(load_config(args.config, args.overrides), args.steps),
    ]
    then = [*settings, *args.then]
    then_nproc = args.then_nproc or args.nproc
    for overrides, nproc in ((settings, args.nproc), (then, then_nproc)):
        check_config(load_config(args.config, overrides), nproc)
    place = _workdir(args.workdir)
    say = (
        (lambda text: print(text, file=sys.stderr, flush=True)) if args.json else (lambda text: print(text, flush=True))
    )
    whole, broken = place / "uninterrupted", place / "interrupted"

    say(f"1/3 {args.steps} steps without a stop")
    run_to_end(args.config, settings, args.nproc, whole)
    how = "killed" if args.kill else "stopped"
    say(f"2/3 the same, {how} after step {stop_at}")
    run_and_break(args.config, settings, args.nproc, broken, stop_at, kill=args.kill)
    say("3/3 resumed to the end" + (f" with {' '.join(args.then)} on {then_nproc} ranks" if args.then else ""))
    run_to_end(args.config, then, then_nproc, broken)
    say(f"it went on from step {resumed_from(broken)}")

    is_other = bool(args.then) or then_nproc != args.nproc
    verdict = compare_losses(whole, broken, LOSS_TOLERANCE) if is_other else compare_exactly(whole, broken)
    _report(verdict, place, args)
    if verdict.is_proved and args.workdir is None:
        shutil.rmtree(place)
    return 0 if verdict.is_proved else 1


def _workdir(given: Path | None) -> Path:
    if given is None:
        return Path(tempfile.mkdtemp(prefix="ling_prove_resume_"))
    if given.exists() and (not given.is_dir() or any(given.iterdir())):
        raise UserError(f"--workdir: {given} is not an empty folder; give another one")
    given.mkdir(parents=True, exist_ok=True)
    return given


def _report(verdict: Verdict, place: Path, args: argparse.Namespace) -> None:
    if args.json:
        kept = str(place) if args.workdir is not None or not verdict.is_proved else None
        print(json.dumps({"proved": verdict.is_proved, **verdict.as_dict(), "folder": kept}))
        return
    print("\n".join(verdict.lines()))
    if verdict.is_proved:
        print("proved: " + verdict.claim)
    else:
        print(f"NOT proved; first difference: {verdict.difference}\nthe runs are kept in {place}")
