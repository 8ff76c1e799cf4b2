"""What a checkpoint costs beside the bare disk: `python tools/bench_checkpoint.py --folder DIR`.

One table of ratios from one run on this machine, each with its target:

save      throughput of a synchronous save against `dd conv=fsync` of as many bytes
load      throughput of loading it again, sizes checked, against the same `dd`; and with checksums
blocking  time for which a background save keeps the run from its next step, against a synchronous save

Rounds alternate, so that all of them see the same disk; medians are compared. The state is that of a dense model in
fp32 on one rank (weights and both moments of AdamW, 12 bytes a parameter), made once; nothing is trained.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ling.checkpoint.folder import read_manifest
from ling.checkpoint.manager import CheckpointManager, Position
from ling.config import Config, load_config
from ling.model.build import build_model, wrap_model
from ling.optim.megatron import build_optimizer
from ling.parallel import groups
from ling.platform import get_platform
from ling.platform.select import choose

RUN = Path(__file__).resolve().parents[1] / "configs" / "runs" / "tiny_dense.yaml"
LEAST_THROUGHPUT, MOST_BLOCKING = 0.70, 0.15
BYTES_PER_PARAMETER = 12


@dataclass
class Times:
    """Seconds of each round."""

    dd: list[float] = field(default_factory=list)
    save: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    load_verified: list[float] = field(default_factory=list)
    blocking: list[float] = field(default_factory=list)
    background: list[float] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table; code 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    parser.add_argument("--megabytes", type=int, default=600, metavar="MB", help="about so much state (default: 600)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of each (default: 3)")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="ling-bench-", dir=args.folder))
    try:
        size, times = measure(folder, args.megabytes, args.rounds)
    finally:
        shutil.rmtree(folder)
    return show(size, times)


def measure(folder: Path, megabytes: int, rounds: int) -> tuple[int, Times]:
    """Bytes of a checkpoint, and the times of all rounds."""
    config = bench_config(megabytes, folder)
    platform = get_platform("auto")
    platform.start(0)
    groups.connect(platform, groups.World(0, 1, 0, 1))
    groups.build_groups(config.parallel)
    groups.seed_random_states(config.run.seed)
    operations = {name: choice.implementation for name, choice in choose(config.runtime, platform.name).items()}
    chunks = wrap_model(
        config, build_model(config, platform.device, bf16=False, operations=operations), platform, bf16=False
    )
    optimizer = build_optimizer(config, chunks, bf16=False, use_gloo_process_groups=False)
    background = replace(config, checkpoint=replace(config.checkpoint, async_save=True))

    def manager(run: Config) -> CheckpointManager:
        return CheckpointManager(run, folder, chunks, optimizer, lambda text: None)

    direct, queued = manager(config), manager(background)
    times, size = Times(), 0
    for number in range(rounds + 1):  # the first one warms up: memory of the copy, plan, page cache
        size, found = one_round(direct, queued, folder, 3 * number)
        for name, seconds in found.items():
            if number:
                getattr(times, name).append(seconds)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    groups.disconnect()
    return size, times


def one_round(
    direct: CheckpointManager, queued: CheckpointManager, folder: Path, step: int
) -> tuple[int, dict[str, float]]:
    """Bytes of a checkpoint, and the seconds of everything once."""
    seconds = {}
    saved = direct.save(Position(step, 0))  # before anything is timed
    size = read_manifest(saved).bytes
    shutil.rmtree(saved)
    seconds["dd"] = timed(lambda: dd(folder / "dd", size))
    os.remove(folder / "dd")
    seconds["save"] = timed(lambda: direct.save(Position(step + 1, 0)))
    saved = saved.with_name(f"step_{step + 1:08d}")
    seconds["load"] = timed(lambda: direct.load(saved))
    seconds["load_verified"] = timed(lambda: (read_manifest(saved, "always"), direct.load(saved)))
    shutil.rmtree(saved)
    started = time.perf_counter()
    seconds["blocking"] = timed(lambda: queued.save(Position(step + 2, 0)))
    queued.close()
    seconds["background"] = time.perf_counter() - started
    shutil.rmtree(folder / "checkpoints")
    return size, seconds


def bench_config(megabytes: int, folder: Path) -> Config:
    """A dense model of about so much state."""
    tokenizer = folder / "tokenizer.txt"
    tokenizer.write_text("none")
    hidden = 512
    config = load_config(RUN, [f"data.tokenizer={tokenizer}", "precision.recipe=fp32", "checkpoint.verify=manifest"])
    layer = 16 * hidden * hidden  # attention 4, FFN 3 x 4
    vocabulary = 2 * hidden * 4096
    layers = max(1, round((megabytes * 1e6 / BYTES_PER_PARAMETER - vocabulary) / layer))
    config.model = replace(
        config.model,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=8,
        num_query_groups=8,
        kv_channels=64,
        vocab_size=4096,
    )
    return config


def dd(path: Path, size: int) -> None:
    """Write zeros to a new file and flush it, as fast as the disk takes them."""
    block = 4 << 20
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={block}", f"count={-(-size // block)}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def show(size: int, times: Times) -> int:
    """Print the table."""
    median = {name: statistics.median(values) for name, values in vars(times).items()}
    rate = {name: size / seconds / 1e6 for name, seconds in median.items()}
    rows = [
        ("save / dd", median["dd"] / median["save"], LEAST_THROUGHPUT, f"{rate['save']:.0f} MB/s"),
        ("load / dd", median["dd"] / median["load"], LEAST_THROUGHPUT, f"{rate['load']:.0f} MB/s"),
        (
            "load with checksums / dd",
            median["dd"] / median["load_verified"],
            LEAST_THROUGHPUT,
            f"{rate['load_verified']:.0f} MB/s",
        ),
    ]
    print(f"{size / 1e6:.0f} MB, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}")
    print(f"dd with fsync {rate['dd']:.0f} MB/s (median of {len(times.dd)})")
    met = True
    for name, ratio, least, figure in rows:
        met &= ratio >= least
        print(f"{name:<28}{ratio:7.2f}   target >= {least:.2f}   {figure}")
    blocking = median["blocking"] / median["save"]
    met &= blocking <= MOST_BLOCKING
    print(
        f"{'blocking / save':<28}{blocking:7.2f}   target <= {MOST_BLOCKING:.2f}   {median['blocking'] * 1e3:.0f} ms "
        f"of {median['background']:.2f} s in the background"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
