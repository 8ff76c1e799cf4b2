"""How a run is doing: step, rate, last checkpoint, restarts, failures, slow ranks and goodput, from its files alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling status`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Show the status; 0 whatever it is."""
    from ling.launch.status import read_status, show

    status = read_status(args.run)
    print(json.dumps(status, indent=2) if args.json else show(status))
    return 0
