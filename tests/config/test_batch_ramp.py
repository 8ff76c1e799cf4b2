"""The growing batch as arithmetic: values by hand, Megatron's own calculator, and what a run takes in all."""

import itertools

import pytest

from ling.config import Config
from ling.config.derived import consumed_samples_after, global_batch_size_at, num_microbatches
from ling.config.rules import config_warnings
from tests.config.test_rules import dense


def config_of(full: int, *ramp: int) -> Config:
    config = Config()
    config.train.global_batch_size, config.train.rampup_batch_size = full, list(ramp) or None
    return config


def batches(config: Config, steps: int) -> list[int]:
    """The sizes of the first steps, one after the other."""
    sizes, consumed = [], 0
    for _ in range(steps):
        sizes.append(global_batch_size_at(config, consumed))
        consumed += sizes[-1]
    return sizes


def test_without_a_ramp_the_batch_is_constant():
    config = config_of(48)
    assert {global_batch_size_at(config, consumed) for consumed in (0, 1, 10**12)} == {48}
    assert [consumed_samples_after(config, steps) for steps in (0, 1, 1000)] == [0, 48, 48000]


def test_by_hand():
    config = config_of(32, 8, 8, 96)  # three increments, one for each 32 samples
    points = {0: 8, 31: 8, 32: 16, 63: 16, 64: 24, 95: 24, 96: 32, 97: 32, 10**9: 32}
    assert {consumed: global_batch_size_at(config, consumed) for consumed in points} == points
    assert batches(config, 10) == [8, 8, 8, 8, 16, 16, 24, 24, 32, 32]
    assert [consumed_samples_after(config, steps) for steps in (0, 4, 5, 8, 9, 109)] == [0, 32, 48, 112, 144, 3344]
    steep = config_of(40, 4, 4, 9)  # an increment for each sample: most sizes are passed over
    assert batches(steep, 5) == [4, 20, 40, 40, 40]
    assert num_microbatches(dense("train.micro_batch_size=4")(), 2, 8) == 1


def test_megatron_agrees():
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    for start, increment, increments, samples in itertools.product(
        (1, 2, 7, 32), (1, 3, 16), (1, 2, 3, 7, 49), (1, 10, 97, 1000, 4099)
    ):
        full = start + increments * increment
        config = config_of(full, start, increment, samples)
        theirs = RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 1, start, increment, samples)
        for consumed in (*range(0, samples + 3, max(1, samples // 150)), samples - 1, samples, samples + 1):
            theirs.update(consumed, consistency_check=True)
            assert global_batch_size_at(config, consumed) == theirs.get_current_global_batch_size()
            assert num_microbatches_of_one(config, consumed) == theirs.get()


def num_microbatches_of_one(config: Config, consumed: int) -> int:
    """Micro-batches of one sample on one rank."""
    return num_microbatches(config, 1, global_batch_size_at(config, consumed))


@pytest.mark.parametrize(
    ("full", "ramp"),
    [(32, (8, 8, 96)), (40, (4, 4, 9)), (49, (1, 1, 4099)), (65, (1, 32, 1000)), (99, (1, 2, 97)), (7, (6, 1, 1))],
)
def test_samples_of_many_steps_at_once_are_those_of_each(full, ramp):
    config = config_of(full, *ramp)
    sizes = batches(config, 700)
    assert sizes[-1] == full
    expected = [0, *itertools.accumulate(sizes)]
    assert [consumed_samples_after(config, steps) for steps in range(701)] == expected


def test_a_ramp_of_many_steps_is_counted_at_once():
    config = config_of(2, 1, 1, 10**9)  # 10^9 steps of 1, then steps of 2; one by one this would take minutes
    assert consumed_samples_after(config, 999_999_999) == 999_999_999
    assert consumed_samples_after(config, 10**9 + 5) == 10**9 + 10


def test_a_run_that_ends_during_its_ramp_is_doubtful():
    assert config_warnings(dense("train.rampup_batch_size=[8,8,1000]")()) == []
    (line,) = config_warnings(dense("train.rampup_batch_size=[8,8,1000]", "train.train_iters=100")())
    assert line == "train.rampup_batch_size: the run takes 800 samples and ends before its ramp of 1000"
