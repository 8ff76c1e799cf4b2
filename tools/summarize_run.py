"""Say in a few lines how a run went: loss at start and end, held-out loss beside the unigram entropy, speed, files."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from ling.checkpoint.folder import newest
from ling.data.inspect import unigram_entropy
from ling.observe.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--train", required=True, help="prefix of the training data")
    parser.add_argument("--valid", required=True, help="prefix of the held-out data")
    args = parser.parse_args()
    records = read_metrics(args.run)
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval" in record]
    if not steps:
        raise SystemExit(f"error: {args.run}/metrics.jsonl has no steps")
    first, last = steps[0], steps[-1]
    rate = statistics.median(record["tokens_per_s"] for record in steps)
    print(f"training loss    {first['loss']:.3f} at step {first['step']} -> {last['loss']:.3f} at step {last['step']}")
    if evaluations:
        held_out = next(iter(evaluations[-1]["eval"].values()))
        corpus, text = unigram_entropy(args.train), unigram_entropy(args.valid)
        print(f"held-out loss    {held_out:.3f} nats per token")
        print(f"unigram entropy  {corpus:.3f} of the corpus, {text:.3f} of the held-out text itself")
        print(f"                 the model is {corpus - held_out:.3f} nats per token below the corpus's")
    print(f"speed            {rate:.0f} tokens/s over all ranks (median step), {last['consumed_tokens']} tokens seen")
    print(f"checkpoint       {newest(args.run)}")
    print(f"metrics          {args.run / 'metrics.jsonl'}")
    print(f"configuration    {args.run / 'config.yaml'}")


if __name__ == "__main__":
    main()
