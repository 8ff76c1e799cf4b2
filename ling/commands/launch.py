"""Start a run as a job: on this machine, under SLURM, or by torchrun on hosts reached by ssh."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ling.commands import add_config_arguments, positive_int
from ling.config import UserError, load_config
from ling.launch.job import KINDS, Job, make_job
from ling.launch.record import record_launch
from ling.launch.render import render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling launch`."""
    parser.add_argument("kind", choices=KINDS, help="where: this machine, SLURM, or hosts reached by ssh")
    add_config_arguments(parser)
    parser.add_argument("--cluster", metavar="FILE", help="cluster file (default: launch.cluster)")
    parser.add_argument("--nodes", type=positive_int, metavar="N", help="nodes (default: launch.nodes)")
    parser.add_argument("--dry-run", action="store_true", help="print the job file and do nothing")


def run(args: argparse.Namespace) -> int:
    """Make the job file and hand it over; the exit code is the job's, or sbatch's."""
    config = load_config(args.config, args.overrides)
    job = make_job(args.kind, config, args.config, args.overrides, cluster_path=args.cluster, nodes=args.nodes)
    text = render(job)
    if args.dry_run:
        print(text, end="")
        return 0
    _check_program(job)
    try:
        path = record_launch(job, text)
    except OSError as error:
        raise UserError(f"{job.run_dir} cannot be written ({error.strerror}): give another run.dir") from error
    if args.kind == "slurm":
        return _submit(path, job)
    sys.stdout.flush()
    return os.execvp("bash", ["bash", str(path)])


def _check_program(job: Job) -> None:
    needed = {"slurm": "sbatch", "torchrun": "ssh", "local": "bash"}[job.kind]
    if shutil.which(needed) is None:
        raise UserError(f"ling launch {job.kind}: there is no {needed} on this machine; --dry-run prints the job file")


def _submit(path: Path, job: Job) -> int:
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"ling: error: sbatch: {' '.join(done.stderr.split())}; the job file is {path}", file=sys.stderr)
        return 1
    number = done.stdout.strip().split(";")[0]
    first = f"{number}_1" if job.config.launch.restart == "array" else number
    print(f"job {number}; its file is {path}, its output {job.run_dir}/job/slurm-{first}.out")
    return 0
