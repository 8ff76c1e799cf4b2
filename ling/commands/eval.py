"""Loss of a checkpoint on held-out data, on one rank."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ling.commands import positive_int

if TYPE_CHECKING:
    from ling.config import Config
    from ling.data.datasets import SampleStream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling eval`."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a checkpoint, or a run's folder (its newest)")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", metavar="PREFIX", nargs="+", help="prepared data: prefix of .bin/.idx")
    data.add_argument("--split", choices=("valid", "test"), help="the run's own data.valid or data.test")
    parser.add_argument("--max-samples", type=positive_int, metavar="N", help="only the first N samples of each source")
    parser.add_argument("--batch-size", type=positive_int, default=8, metavar="B", help="samples of a pass (default 8)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print loss, perplexity and bits per byte of each source."""
    from ling.data.index_file import read_side_file
    from ling.data.tokenizer import load_tokenizer
    from ling.platform import get_platform

    platform = get_platform(args.device)
    platform.start(0)
    from ling.checkpoint.restore import restore_model, saved_config

    folder, manifest, config = saved_config(args.checkpoint, args.device)
    tokenizer = load_tokenizer(folder / "tokenizer")
    config.data.tokenizer = str(folder / "tokenizer")
    streams = _streams(args, config, tokenizer.fingerprint)
    model = restore_model(folder, config, platform)
    results = {}
    for name, stream in streams.items():
        results[name] = _evaluate(model, stream, args.batch_size, args.max_samples)
        side = read_side_file(stream.sources[0].path)
        if side and side["bytes"]:
            results[name]["bits_per_byte"] = results[name]["loss"] / math.log(2) * side["tokens"] / side["bytes"]
    if args.json:
        print(json.dumps({"checkpoint": str(folder), "step": manifest.step, "results": results}))
        return 0
    print(f"{folder} (step {manifest.step})")
    for name, result in results.items():
        bits = f", {result['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in result else ""
        perplexity = math.exp(min(result["loss"], 700.0))
        print(f"  {name}: loss {result['loss']:.4f} nats per token over {result['tokens']} tokens")
        print(f"  {' ' * len(name)}  perplexity {perplexity:.4g}{bits}")
    return 0


def _streams(args: argparse.Namespace, config: Config, fingerprint: str) -> dict[str, SampleStream]:
    """The samples to evaluate on by name: the files given, or those of the run."""
    from ling.config.derived import data_sources, test_sources, valid_sources
    from ling.config.errors import UserError
    from ling.data.datasets import build_test_streams, build_valid_streams
    from ling.data.index_file import check_prefix

    if args.data:
        paths = [source.path for source in data_sources(args.data, "--data")]
        config.data.valid, config.data.split = [{"path": path, "name": path} for path in paths], None
    sources = test_sources(config) if args.split == "test" else valid_sources(config)
    if not sources:
        raise UserError(f"--split {args.split}: the run has no data.{args.split}; name files with --data")
    for source in sources:
        check_prefix(source.path, fingerprint)
    return build_test_streams(config) if args.split == "test" else build_valid_streams(config)


def _evaluate(model: Any, stream: SampleStream, batch_size: int, max_samples: int | None) -> dict[str, float]:
    from ling.data.datasets import stack
    from ling.model.inference import token_losses

    device = next(model.parameters()).device
    assert stream.num_samples is not None
    count = min(stream.num_samples, max_samples or stream.num_samples)
    loss_sum, tokens = 0.0, 0
    for first in range(0, count, batch_size):
        samples = [stream.sample(i) for i in range(first, min(first + batch_size, count))]
        batch = {key: value.to(device) for key, value in stack(samples).items()}
        mask = batch["loss_mask"].double()
        loss_sum += float((token_losses(model, batch).double() * mask).sum())
        tokens += int(mask.sum())
        if sys.stderr.isatty():
            print(f"\r{first + len(samples)}/{count} samples", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
    return {"loss": loss_sum / tokens, "tokens": tokens, "samples": count}
