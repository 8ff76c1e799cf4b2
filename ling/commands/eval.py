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
    from ling.data.datasets import SampleStream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling eval`."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a checkpoint, or a run's folder (its newest)")
    parser.add_argument("--data", metavar="PREFIX", nargs="+", required=True, help="prepared data: prefix of .bin/.idx")
    parser.add_argument("--max-samples", type=positive_int, metavar="N", help="only the first N samples of each source")
    parser.add_argument("--batch-size", type=positive_int, default=8, metavar="B", help="samples of a pass (default 8)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print loss, perplexity and bits per byte of each source."""
    from ling.config.derived import data_sources
    from ling.data.datasets import build_valid_streams
    from ling.data.index_file import check_prefix, read_side_file
    from ling.data.tokenizer import load_tokenizer
    from ling.platform import get_platform

    platform = get_platform(args.device)
    platform.start(0)
    from ling.checkpoint.restore import restore_model, saved_config

    folder, manifest, config = saved_config(args.checkpoint, args.device)
    tokenizer = load_tokenizer(folder / "tokenizer")
    side_files = {}
    for source in data_sources(args.data, "--data"):
        check_prefix(source.path, tokenizer.fingerprint)
        side_files[source.path] = read_side_file(source.path)
    config.data.tokenizer = str(folder / "tokenizer")
    config.data.valid = [{"path": path, "name": path} for path in side_files]
    streams = build_valid_streams(config)
    model = restore_model(folder, config, platform)
    results = {}
    for path, stream in streams.items():
        results[path] = _evaluate(model, stream, args.batch_size, args.max_samples)
        side = side_files[path]
        if side and side["bytes"]:
            results[path]["bits_per_byte"] = results[path]["loss"] / math.log(2) * side["tokens"] / side["bytes"]
    if args.json:
        print(json.dumps({"checkpoint": str(folder), "step": manifest.step, "results": results}))
        return 0
    print(f"{folder} (step {manifest.step})")
    for path, result in results.items():
        bits = f", {result['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in result else ""
        perplexity = math.exp(min(result["loss"], 700.0))
        print(f"  {path}: loss {result['loss']:.4f} nats per token over {result['tokens']} tokens")
        print(f"  {' ' * len(path)}  perplexity {perplexity:.4g}{bits}")
    return 0


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
