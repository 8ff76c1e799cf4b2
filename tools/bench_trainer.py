"""What the trainer costs beside its model, and how long `ling` takes to start: `python tools/bench_trainer.py`.

One table of figures from one run on this machine, each with its target:

throughput  `Trainer.train_step` with data, metrics.jsonl and console lines, against a bare loop around a model of the
            same build: megatron-core's schedule on batches that wait in memory, and the optimizer. Both live in this
            process, take turns of some steps, and see the same samples at the same learning rates; compared are the
            median times of a step. The bare loop is spared Python's garbage collection; the trainer's share of it is
            added to its time.
first step  from the start of a `ling train` process to the console line of its first step.
help        `ling --help`, a whole process.

The model is that of configs/runs/tiny_moe.yaml on one rank. Without --data and --tokenizer it trains on random words.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ling.config import Config, check_config, load_config
from ling.data.datasets import BatchIterator, build_train_stream
from ling.data.prepare import prepare
from ling.data.tokenizer import train_sentencepiece
from ling.parallel import groups
from ling.platform import Platform, get_platform
from ling.platform.select import choose, precision_recipe

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "configs" / "runs" / "tiny_moe.yaml"
LEAST_RATIO, MOST_START_S, MOST_HELP_S = 0.95, 20.0, 0.3
WARM_UP_STEPS = 2
WORDS, SYNTHETIC_DOCUMENTS, WORDS_PER_DOCUMENT = 8000, 200, 1000


class Figure(NamedTuple):
    """A line of the table."""

    what: str
    measured: str
    target: str
    met: bool


def main(argv: list[str] | None = None) -> int:
    """Measure what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PREFIX", help="prepared data; default: random words")
    parser.add_argument("--tokenizer", metavar="T", help="the tokenizer that it was prepared with")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="turns of each loop (default: 8)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps of a turn (default: 5)")
    parser.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="processes started of each kind (default: 3)"
    )
    parser.add_argument("--only", choices=("throughput", "start", "help"), action="append", help="leave out the others")
    args = parser.parse_args(argv)
    if (args.data is None) != (args.tokenizer is None):
        parser.error("--data and --tokenizer go together")
    # megatron-core's remarks on absent packages, and torch's on collectives that megatron-core calls by old names
    warnings.simplefilter("ignore")
    wanted = args.only or ["throughput", "start", "help"]
    figures = []
    with tempfile.TemporaryDirectory(prefix="ling-bench-") as folder:
        if "help" in wanted:
            figures.append(bench_help(args.repeat))
        if wanted != ["help"]:
            data, tokenizer = (args.data, args.tokenizer) if args.data else synthetic_data(Path(folder))
            overrides = run_overrides(data, tokenizer, Path(folder) / "run")
            if "start" in wanted:
                figures.append(bench_start(overrides, args.repeat))
            if "throughput" in wanted:
                figures.append(bench_throughput(overrides, args.rounds, args.steps))
    for row in [Figure("", "measured", "target", True), *figures]:
        verdict = "" if not row.what else "met" if row.met else "missed"
        print(f"{row.what:<40} {row.measured:<34} {row.target:<8} {verdict}".rstrip())
    return 0


def run_overrides(data: str, tokenizer: str, folder: Path) -> list[str]:
    """The shipped run on one rank, on this data, without evaluations."""
    return [
        "parallel.expert_model_parallel_size=1",
        f"data.train={data}",
        "data.valid=null",
        f"data.tokenizer={tokenizer}",
        "train.eval_interval=0",
        f"run.dir={folder}",
    ]


def synthetic_data(folder: Path) -> tuple[str, str]:
    """Prefix and tokenizer of random words, the frequent ones more often, made in `folder`."""
    draw = random.Random(0)
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(WORDS)]
    frequency = [1 / (rank + 3) for rank in range(WORDS)]
    documents = (
        " ".join(draw.choices(words, frequency, k=WORDS_PER_DOCUMENT)) + "\n\n" for _ in range(SYNTHETIC_DOCUMENTS)
    )
    text, tokenizer, prefix = folder / "text.txt", folder / "tokenizer", folder / "train"
    text.write_text("".join(documents))
    train_sentencepiece([text], load_config(RUN).model.vocab_size, tokenizer)
    prepare([text], tokenizer, prefix, separator="")
    return str(prefix), str(tokenizer)


def bench_help(repeat: int) -> Figure:
    """Seconds of `ling --help`."""

    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ling", "--help"], stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - start

    seconds = statistics.median(once() for _ in range(repeat))
    return Figure("ling --help", f"{seconds:.3f} s", f"< {MOST_HELP_S} s", seconds < MOST_HELP_S)


def bench_start(overrides: list[str], repeat: int) -> Figure:
    """Seconds from the start of a process to the console line of the first step."""
    seconds = statistics.median(_first_step(overrides) for _ in range(repeat))
    return Figure("ling train to its first step", f"{seconds:.1f} s", f"< {MOST_START_S:g} s", seconds < MOST_START_S)


def _first_step(overrides: list[str]) -> float:
    command = [sys.executable, "-m", "ling", "train", str(RUN), *overrides]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = any(line.startswith("step ") for line in process.stdout)
        seconds = time.perf_counter() - start
        process.kill()
    if not found:
        raise RuntimeError(f"ling train ended with code {process.returncode} before its first step")
    return seconds


def bench_throughput(overrides: list[str], rounds: int, steps: int) -> Figure:
    """Tokens per second of the trainer over those of the bare loop."""
    config = load_config(RUN, overrides)
    check_config(config, 1)
    platform = get_platform(config.runtime.platform)
    platform.start(0, config.runtime.num_threads)
    config.precision.recipe = precision_recipe(config.precision, platform)
    groups.connect(platform, groups.World(0, 1, 0, 1))
    try:
        groups.build_groups(config.parallel)
        groups.seed_random_states(config.run.seed)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            trainers, collection_s = trainer_step(config, platform)
            bare = bare_step(config, platform, WARM_UP_STEPS + rounds * steps)
            times = take_turns([trainers, bare], rounds, steps, platform)
    finally:
        groups.disconnect()
    ours, theirs = statistics.median(times[0]) + collection_s, statistics.median(times[1])
    tokens = config.train.global_batch_size * config.data.sequence_length
    ratio = theirs / ours
    measured = f"{ratio:.3f} ({tokens / ours:,.0f} / {tokens / theirs:,.0f})"
    return Figure("tokens/s, ling train / bare loop", measured, f">= {LEAST_RATIO}", ratio >= LEAST_RATIO)


def take_turns(loops: list[Callable[[], None]], rounds: int, steps: int, platform: Platform) -> list[list[float]]:
    """Seconds of every step of each loop; a first round, in which memory is fetched and kernels are chosen, is lost."""
    times: list[list[float]] = [[] for _ in loops]
    gc.collect()
    gc.disable()
    for number in range(rounds + 1):
        for loop, seconds in zip(loops, times, strict=True):
            for _ in range(steps if number else WARM_UP_STEPS):
                platform.synchronize()
                start = time.perf_counter()
                loop()
                platform.synchronize()
                if number:
                    seconds.append(time.perf_counter() - start)
    gc.enable()
    return times


def trainer_step(config: Config, platform: Platform) -> tuple[Callable[[], None], float]:
    """A step of the trainer with all that a run does around it, and the seconds that garbage collection adds to it."""
    from ling.train import build_trainer

    folder = Path(str(config.run.dir))
    trainer = build_trainer(config, groups.World(0, 1, 0, 1), platform, folder, 0)
    train, workers = config.train, config.data.num_workers
    batches: list[Iterator[Any]] = [
        BatchIterator(trainer.train_stream, train.micro_batch_size, train.global_batch_size, 0, 1, 0, workers)
    ]

    def step() -> None:
        trainer._log_step(trainer.train_step(batches))

    start = time.perf_counter()
    gc.collect()
    return step, (time.perf_counter() - start) / (train.gc_interval or 100)


def bare_step(config: Config, platform: Platform, steps: int) -> Callable[[], None]:
    """A step of the shortest loop that trains a model of the same build; it can be called `steps` times."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from ling.model.build import build_model, wrap_model
    from ling.optim.megatron import build_optimizer
    from ling.optim.schedules import learning_rate, set_learning_rate
    from ling.trainer import finalize_step

    bf16 = config.precision.recipe == "bf16"
    operations = {name: choice.implementation for name, choice in choose(config.runtime, platform.name).items()}
    chunks = wrap_model(
        config, build_model(config, platform.device, bf16=bf16, operations=operations), platform, bf16=bf16
    )
    model = chunks[0]
    model.train()
    optimizer = build_optimizer(config, chunks, bf16=bf16, use_gloo_process_groups=False)
    rates = iter([learning_rate(step, config.optim, config.train.train_iters) for step in range(1, steps + 1)])
    model.config.finalize_model_grads_func = finalize_step
    model.config.grad_scale_func = optimizer.scale_loss
    micro, total = config.train.micro_batch_size, config.train.global_batch_size
    made = itertools.islice(BatchIterator(build_train_stream(config), micro, total, 0, 1), steps * total // micro)
    batches = iter([{key: value.to(platform.device) for key, value in batch.items()} for batch in made])
    forward_backward = get_forward_backward_func()

    def forward(batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        mask = batch["loss_mask"]
        losses = model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=mask.to(torch.int64)
        )
        return losses, lambda losses: ((losses.float() * mask).sum(), mask.sum().to(torch.int), {})

    def step() -> None:
        set_learning_rate(optimizer, next(rates))
        model.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(
            forward_step_func=forward,
            data_iterator=batches,
            model=model,
            num_microbatches=total // micro,
            seq_length=config.data.sequence_length,
            micro_batch_size=micro,
            forward_only=False,
        )
        optimizer.step()

    return step


if __name__ == "__main__":
    sys.exit(main())
