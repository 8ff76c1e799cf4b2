"""Make a checkpoint from a Hugging Face model directory: Ling 2.0, or an export of `ling`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ling.commands import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling import`."""
    parser.add_argument("folder", metavar="HF_DIR", type=Path, help="model directory: config.json, safetensors files")
    parser.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to write; must not exist")
    parser.add_argument("--config", metavar="CONFIG", help="config of the run that begins from it; its model must fit")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, too")
    parser.add_argument("--workers", type=positive_int, default=2, metavar="N", help="threads (default 2)")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint and say what to do with it."""
    from ling.hf.importing import import_model
    from ling.model.counts import count_parameters

    config = import_model(
        args.folder, args.out, config_file=args.config, allow_pickle=args.allow_pickle, workers=args.workers
    )
    print(f"{args.out}: {count_parameters(config.model).total:,} parameters, {config.precision.recipe}")
    return 0
