"""The worlds that other tests run in: what a rank returns, and that a broken world fails a test and ends there."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from ling.parallel.groups import World
from tests.dist.ranks import RankError


def who_am_i(offset: int) -> tuple[int, int, int, int]:
    """Rank, size, sum over the ranks of `rank + offset`, and process."""
    world = World.from_environment()
    total = torch.tensor([world.rank + offset])
    dist.all_reduce(total)
    return world.rank, world.size, int(total), os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} is the culprit")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("goodbye", flush=True)
        os._exit(3)
    dist.barrier()


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_worlds_of_all_sizes_from_the_same_processes(ranks):
    processes: dict[int, int] = {}
    for size in (1, 2, 4, 2, 1):
        results = ranks.run(size, who_am_i, 10)
        assert [result[:2] for result in results] == [(rank, size) for rank in range(size)]
        assert {result[2] for result in results} == {10 * size + sum(range(size))}
        for rank, _, _, process in results:
            assert processes.setdefault(rank, process) == process
    assert len(set(processes.values())) == 4


def test_an_exception_on_one_rank_is_told_and_the_next_world_works(ranks):
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2: .*in fail_on.*ValueError: rank 1 is the culprit"):
        ranks.run(2, fail_on, 1)
    assert [result[0] for result in ranks.run(2, who_am_i, 0)] == [0, 1]
    with pytest.raises(RankError, match="rank 0 of 1: .*"):
        ranks.run(1, fail_on, 0)
    assert ranks.run(1, who_am_i, 0)[0][0] == 0


def test_a_dead_rank_and_a_late_one_are_told(ranks):
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2: the process ended; its last output:\n.*goodbye"):
        ranks.run(2, die_on, 1)
    with pytest.raises(RankError, match="rank 0 of 1 gave no answer in time"):
        ranks.run(1, sleep, 600, timeout_s=0.5)
    assert ranks.run(1, who_am_i, 0)[0][0] == 0


@pytest.mark.ranks(2)
def test_a_marked_test_runs_on_every_rank(tmp_path):
    assert dist.get_world_size() == 2
    (tmp_path / str(dist.get_rank())).touch()
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
