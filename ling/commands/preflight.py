"""Check this node before a run: GPUs, driver, clock, disk and the run's folder; under torchrun all ranks together.

Started plainly it needs no torch and takes a second. Started by torchrun it multiplies matrices, fills memory and sums
over all ranks, with the measured bandwidth; rank 0 names the bad nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from pathlib import Path
from typing import Any

NODE_TIMEOUT_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling preflight`."""
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run's folder, to be seen and written")
    parser.add_argument("--job", metavar="NAME", help="keep the report in the run's folder, as that of JOB.NUMBER")
    parser.add_argument("--gpus", type=_count, metavar="N", help="GPUs that each node must have (0: use none)")
    parser.add_argument("--free-gb", type=float, default=1.0, metavar="X", help="space that the folder needs (1)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Check; 0 where all is well, 1 where something is not."""
    if "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ:
        return _run_ranks(args)
    timer = threading.Timer(NODE_TIMEOUT_S, os._exit, (1,))  # a file system that hangs cannot be given up otherwise
    timer.daemon = True
    timer.start()
    try:
        return _run_node(args)
    finally:
        timer.cancel()


def _run_node(args: argparse.Namespace) -> int:
    from ling.launch.node_checks import check_node
    from ling.launch.reports import write_report

    is_kept = args.run_dir is not None and args.job is not None
    if is_kept and not (args.run_dir / "job" / "starts.jsonl").is_file():
        print(f"ling: error: preflight: {args.run_dir} is not the folder that the other nodes see", flush=True)
        return 1
    report = check_node(args.run_dir, args.gpus, args.free_gb)
    if is_kept:
        try:
            write_report(args.run_dir, args.job, report["node"], report)
        except OSError as error:
            report["problems"].append(f"the report cannot be written: {error.strerror}")
    _show(report, args.json, [[report["node"], problem] for problem in report["problems"]])
    return 1 if report["problems"] else 0


def _run_ranks(args: argparse.Namespace) -> int:
    from ling.launch.rank_checks import check_ranks
    from ling.parallel.groups import World
    from ling.platform import get_platform

    world = World.from_environment()
    platform = get_platform("auto" if args.gpus is None else "cuda" if args.gpus else "cpu")
    report = check_ranks(platform, world, args.run_dir if args.job else None, args.job or "preflight")
    if world.rank == 0:
        _show(report, args.json, report["problems"])
    return 1 if report["problems"] else 0


def _show(report: dict[str, Any], as_json: bool, problems: list[list[str]]) -> None:
    if as_json:
        print(json.dumps(report, indent=2), flush=True)
        return
    for node, problem in problems:
        print(f"ling: error: preflight: {node}: {problem}", flush=True)
    if problems:
        return
    if "world_size" in report:
        speed = f"{report['tflops']:.3g} TFLOP/s each (slowest {report['slowest_tflops']:.3g})"
        reduced = f"all-reduce {report['bandwidth_gb_s']:.3g} GB/s"
        print(f"preflight: {report['world_size']} ranks are fit: {speed}, {reduced}", flush=True)
    else:
        gpus = f"{len(report['gpus'])} GPUs" if report["gpus"] else "no GPU looked for or found"
        print(f"preflight: {report['node']} is fit: {gpus}", flush=True)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)
