"""The order of the data while the batch grows: the same stream on every layout, with workers, and after a resume."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from ling.cli import main
from ling.config.derived import consumed_samples_after, global_batch_size_at
from ling.config.report import save_config
from ling.data import build_index
from ling.data.build_index import Built
from ling.data.checks import shares
from ling.data.datasets import BatchIterator, build_train_stream
from ling.data.trace import step_of_rank
from tests.dist.training import tiny_config

MICRO, SIZES = 2, [8, 8, 16, 24, 32, 32]
FIRST = [0, *itertools.accumulate(SIZES)]


@pytest.fixture
def ramp(config):
    """The tests' data with a batch that grows from 8 to 32 over 48 samples: 8 at 0, 8 at 8, 16 at 16, 24 at 32."""
    config.train.micro_batch_size, config.train.global_batch_size = MICRO, 32
    config.train.rampup_batch_size, config.train.train_iters = [8, 8, 48], len(SIZES)
    return config


def steps_of_ranks(config, stream, dp_size: int, done: int = 0, num_workers: int = 0) -> list[torch.Tensor]:
    """The global batches of the steps after `done`, as the trainer takes them, put together from all ranks."""
    consumed = consumed_samples_after(config, done)
    ranks = [BatchIterator(stream, MICRO, 32, rank, dp_size, consumed, num_workers) for rank in range(dp_size)]
    batches = []
    for _ in SIZES[done:]:
        size = global_batch_size_at(config, consumed)
        parts = [next(rank)["tokens"] for _ in range(size // (MICRO * dp_size)) for rank in ranks]
        batches.append(torch.cat(parts))
        consumed += size
    assert {rank.consumed_samples for rank in ranks} == {consumed}
    for rank in ranks:
        rank.close()
    return batches


def test_order_is_the_same_on_every_layout_with_workers_and_after_resume(ramp):
    stream = build_train_stream(ramp)
    samples = torch.stack([torch.from_numpy(stream.sample(i)["tokens"]) for i in range(sum(SIZES))])
    expected = samples.split(SIZES)

    def check(dp_size: int, done: int = 0, num_workers: int = 0) -> None:
        found = steps_of_ranks(ramp, stream, dp_size, done, num_workers)
        for ours, theirs in zip(found, expected[done:], strict=True):
            assert torch.equal(ours, theirs)

    for dp_size, done in itertools.product((1, 2, 4), range(len(SIZES))):
        check(dp_size, done)
    for dp_size, done, num_workers in ((1, 0, 2), (2, 1, 1), (2, 3, 2)):
        check(dp_size, done, num_workers)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_trace_finds_the_samples_of_each_step(ramp, size):
    stream = build_train_stream(ramp)
    ranks = [BatchIterator(stream, MICRO, 32, rank, size) for rank in range(size)]
    for step, batch in enumerate(SIZES, start=1):
        for rank in range(size):
            found = step_of_rank(ramp, step, rank, size)
            assert (found.first, found.global_batch_size) == (FIRST[step - 1], batch)
            assert len(found.micro_batches) == batch // (MICRO * size)
            for numbers in found.micro_batches:
                expected = torch.stack([torch.from_numpy(stream.sample(i)["tokens"]) for i in numbers])
                assert torch.equal(next(ranks[rank])["tokens"], expected)


def test_what_a_run_takes(ramp):
    (one, other) = shares(ramp, build_train_stream(ramp).sources, [32 * 60 + 1, 32 * 30 + 1])
    assert one.epochs == pytest.approx(0.75 * sum(SIZES) / 60)
    assert other.epochs == pytest.approx(0.25 * sum(SIZES) / 30)


def test_commands(ramp, tmp_path, capsys, monkeypatch):
    made = tiny_config()
    made.data, made.train, made.model.vocab_size = ramp.data, ramp.train, ramp.model.vocab_size
    made.train.eval_iters = 1
    save_config(made, tmp_path / "run.yaml")
    run = str(tmp_path / "run.yaml")
    assert main(["data", "inspect", run]) == 0
    assert f"6 steps take {sum(SIZES) * 32:,} tokens" in capsys.readouterr().out
    assert main(["data", "trace", run, "--step", "4", "--rank", "1", "--world", "2", "--json"]) == 0
    samples = [sample["sample"] for sample in json.loads(capsys.readouterr().out)["samples"]]
    assert samples == [i for i in range(32, 56) if i // MICRO % 2 == 1]
    assert main(["data", "trace", run, "--step", "4"]) == 0
    assert "24 of the samples 32 to 55" in capsys.readouterr().out
    assert main(["config", "check", run, "--world", "4"]) == 0
    assert "1 to 4 microbatches per step" in capsys.readouterr().out
    asked = []
    monkeypatch.setattr(build_index, "build_index", lambda stream, samples, *_: asked.append(samples) or Built(0, 0))
    assert main(["data", "index", run]) == 0
    assert asked == [sum(SIZES)]
