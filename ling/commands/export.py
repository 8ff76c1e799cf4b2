"""Make a Hugging Face model directory from a checkpoint of any layout, and compare the two."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ling.checkpoint.exports import exports_run, give_way
from ling.commands import positive_int
from ling.config.errors import UserError
from ling.config.schema import Config

if TYPE_CHECKING:
    from ling.hf.export import Source

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
SETTINGS = "checkpoint.export_every=null checkpoint.export_at_end=false"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def byte_size(text: str) -> int:
    """A size such as `5GB` in bytes, as an argument's type."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 5GB, got {text!r}")
    return size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling export`."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a checkpoint, or a run's folder (its newest)")
    parser.add_argument("out", metavar="OUT", type=Path, help="model directory to write; must not exist")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="number format of the weights (default: the run's)")
    parser.add_argument(
        "--max-shard-size", type=byte_size, default="5GB", metavar="SIZE", help="largest file (default 5GB)"
    )
    parser.add_argument("--workers", type=positive_int, default=2, metavar="N", help="threads (default 2)")
    parser.add_argument(
        "--verify", action="store_true", help="compare checkpoint and model directory before OUT gets its name"
    )
    parser.add_argument(
        "--verify-only", action="store_true", help="write nothing: OUT exists and is compared (its code is run)"
    )
    parser.add_argument(
        "--data", metavar="PREFIX", help="compare on this prepared data (default: the run's validation)"
    )
    parser.add_argument(
        "--tokens", type=positive_int, default=256, metavar="N", help="longest sequence compared (default 256)"
    )


def run(args: argparse.Namespace) -> int:
    """Export, compare, or both; 1 where both sides differ."""
    give_way()
    if args.verify and args.verify_only:
        raise UserError("--verify and --verify-only: give one; --verify-only compares what is there already")
    if args.data is not None and not (args.verify or args.verify_only):
        raise UserError("--data: is for the comparison; give --verify or --verify-only, too")
    from ling.platform import get_platform

    if args.verify or args.verify_only:
        from ling.hf.verify import require_transformers

        require_transformers()
        get_platform("cpu").start(0)
    from ling.hf.export import Options, export, open_source
    from ling.hf.verify import VerificationError

    dtype = None if args.dtype is None else DTYPES[args.dtype]

    def check(source: Source, folder: Path) -> None:
        from ling.hf.samples import sample_tokens
        from ling.hf.verify import verify

        verdict = verify(source, folder, sample_tokens(source, args.data, longest=args.tokens))
        print(verdict.text)
        if verdict.problems:
            raise VerificationError

    try:
        if args.verify_only:
            if not args.out.is_dir():
                raise UserError(f"{args.out} is no folder; --verify-only compares an export that is there")
            check(open_source(args.checkpoint, dtype), args.out)
            return 0
        options = Options(dtype, args.max_shard_size, args.workers)
        source = export(args.checkpoint, args.out, options, _command(args), check if args.verify else None)
    except VerificationError:
        return 1
    print(f"{args.out}: step {source.manifest.step} of {source.folder}, {source.dtype}")
    return 0


def check_exports_of(config: Config, whole: bool) -> None:
    """Where a run is to export its checkpoints, see that it can, before it starts.

    Args:
        whole: look at the tokenizer, too, which must be there then.

    Raises:
        UserError: a model directory cannot express the model or the tokenizer.
    """
    if not exports_run(config.checkpoint):
        return
    from ling.hf.export import check_model, check_run

    try:
        check_run(config) if whole else check_model(config.model)
    except UserError as error:
        key = "export_every" if config.checkpoint.export_every is not None else "export_at_end"
        raise UserError(f"checkpoint.{key}: {error}; or do without exports: {SETTINGS}") from None


def _command(args: argparse.Namespace) -> str:
    words = ["ling", "export", str(args.checkpoint), str(args.out)]
    words += ["--dtype", args.dtype] if args.dtype else []
    words += ["--max-shard-size", str(args.max_shard_size)] if args.max_shard_size != byte_size("5GB") else []
    return shlex.join(words)
