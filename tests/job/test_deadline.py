"""Time limits: how they are written, which one counts, and when a run must stop for them."""

import math
import time

import pytest

from ling.config import UserError, check_config
from ling.config.duration import parse_duration
from ling.job.deadline import Deadline, find_deadline


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("23:50:00", 85800), ("2-00:00:10", 172810), ("90m", 5400), ("1.5h", 5400), ("45", 45), ("1 d", 86400)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "12:61:00", "5:00", "-3", "0", "00:00:00", "1h30m"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="no length of time; write 23:50:00|is no time at all"):
        parse_duration(text)


def test_the_config_names_the_key(tiny_config):
    tiny_config.train.time_limit = "a day"
    with pytest.raises(UserError, match="train.time_limit: 'a day' is no length of time; write 23:50:00"):
        check_config(tiny_config)


@pytest.fixture
def tiny_config():
    from tests.dist.training import tiny_config

    return tiny_config(1, train={"time_limit": None})  # with a branch of its own, since the others are shared


def test_the_earlier_limit_counts():
    now = time.monotonic()
    slurm = {"SLURM_JOB_END_TIME": str(int(time.time()) + 1000)}
    assert find_deadline(None, now, {}).end == math.inf
    assert not find_deadline(None, now, {}).is_near()
    assert find_deadline("10m", now, slurm).end == now + 600
    assert find_deadline("10m", now, slurm).source == "train.time_limit 10m"
    found = find_deadline("1h", now, slurm)
    assert found.source == "the end of the SLURM job"
    assert 900 < found.end - now <= 1001


def test_a_slurm_end_that_has_passed_or_is_no_number_does_not_count():
    for value in (str(int(time.time()) - 5), "Unknown", ""):
        assert find_deadline(None, 0.0, {"SLURM_JOB_END_TIME": value}).end == math.inf


def test_the_margin_has_room_for_a_step_and_a_save():
    deadline = Deadline(end=1000.0, total=1000.0)
    assert deadline.margin == 100.0, "a tenth of the whole time, while no save is known"
    deadline.measured_step(20.0)
    deadline.measured_save(30.0)
    assert deadline.margin == 1.5 * 20 + 2 * 30
    assert not deadline.is_near(909.0)
    assert deadline.is_near(910.0)
    deadline.measured_save(10.0)
    assert deadline.margin == 90.0, "the longest save counts"
    for _ in range(100):
        deadline.measured_step(2.0)
    assert deadline.margin == 63.0, "a long first step is forgotten"
    assert Deadline(end=1e6, total=1e6).margin == 120.0
