"""Saves of a run: now and in the background, their failures, and what is kept."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ling.checkpoint import torch_dist
from ling.checkpoint.folder import checkpoints, newest, read_manifest, step_folder
from ling.checkpoint.manager import CheckpointError
from ling.trainer import NonFiniteError, Trainer
from tests.checkpoint.runs import run_config, spoil, steps, weights_of
from tests.dist.training import build_trainer


def make_trainer(layout: str, folder: Path, said: list[str] | None = None, **settings) -> Trainer:
    trainer = build_trainer(run_config(layout, folder, checkpoint=settings), folder)
    if said is not None:
        trainer.checkpoints._announce = said.append
    return trainer


def poll_until_done(trainer: Trainer) -> None:
    """Until this rank has written, and then until all have."""
    save = trainer.checkpoints._under_way
    if save is not None:
        save.job.wait()
    while trainer.checkpoints._under_way is not None:
        trainer.checkpoints.poll()


class FullDisk:
    """os.write of a disk that has room for so many more bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, descriptor: int, data: memoryview) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return os.write(descriptor, data)


@contextmanager
def full_disk(room: int = 100_000, on: bool = True) -> Iterator[None]:
    """This process finds the disk full after so many bytes, where it is `on`."""
    if on:
        torch_dist.write_some = FullDisk(room)
    try:
        yield
    finally:
        torch_dist.write_some = os.write


@pytest.mark.ranks(2)
@pytest.mark.parametrize("layout", ["EP2", "DP2"])
def test_a_save_in_the_background_is_of_the_moment_when_it_began(tmp_path, layout):
    trainer = make_trainer(layout, tmp_path, async_save=True)
    steps(trainer, 1)
    expected = {name: value.clone() for name, value in weights_of(trainer)[1].items()}
    folder = trainer.save()
    assert not folder.exists(), "it gets its name when it is polled"
    spoil(trainer)  # while it is being written
    poll_until_done(trainer)
    assert read_manifest(folder, "always").step == 1
    trainer.load(folder)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(trainer)[1].items())


@pytest.mark.ranks(2)
def test_training_goes_on_while_it_is_written(tmp_path):
    losses = []
    for number, is_async in enumerate((False, True)):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        trainer = make_trainer("DP2", folder, async_save=is_async)
        losses.append([])
        for _ in range(3):
            losses[-1] += steps(trainer, 1)
            trainer.save()
            trainer.checkpoints.poll()
        trainer.checkpoints.close()
        assert [step for step, _ in checkpoints(folder)] == [1, 2, 3]
        for _, path in checkpoints(folder):
            read_manifest(path, "always")
    assert losses[0] == losses[1]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("most", "complete"), [(1, [True, True, True]), (2, [False, True, True]), (None, [False, False, False])]
)
def test_a_save_is_waited_for_before_more_steps_could_be_lost(tmp_path, most, complete):
    trainer = make_trainer("DP2", tmp_path, async_save=True, save_interval=1, max_lost_steps=most)
    steps(trainer, 1)
    folder = trainer.save()  # nobody polls
    update, found = trainer.optimizer.step, []

    def step():
        found.append(folder.exists())
        return update()

    trainer.optimizer.step = step
    steps(trainer, 3)
    assert found == complete
    trainer.checkpoints.close()


@pytest.mark.ranks(2)
def test_a_failed_background_save_is_told_to_all_ranks_and_the_next_is_not_in_the_background(tmp_path):
    said: list[str] = []
    trainer = make_trainer("EP2", tmp_path, said, async_save=True)
    steps(trainer, 1)
    with full_disk(on=trainer.world.rank == 1):
        first = trainer.save()
        poll_until_done(trainer)
    assert said == [
        f"warning: {first} could not be saved: rank 1: OSError: No space left on device; "
        "the next save will not be in the background"
    ]
    assert not list((tmp_path / "checkpoints").iterdir()), "the room is given back"
    steps(trainer, 1)
    second = trainer.save()
    assert read_manifest(second, "always").step == 2, "it was there at once"
    assert said[1:] == [f"saved {second}"]
    steps(trainer, 1)
    third = trainer.save()
    assert not third.exists(), "in the background again"
    poll_until_done(trainer)
    assert third.exists()
    trainer.checkpoints.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("is_async", [True, False])
def test_a_failed_save_ends_the_run_on_all_ranks(tmp_path, is_async):
    trainer = make_trainer("DP2", tmp_path, async_save=is_async)
    steps(trainer, 1)
    good = trainer.save(final=True)
    steps(trainer, 1)
    with full_disk(on=trainer.world.rank == 1):
        if is_async:
            trainer.save()
            poll_until_done(trainer)
        with pytest.raises(CheckpointError, match="could not be saved: rank 1: OSError: No space left on device"):
            trainer.save()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert newest(tmp_path) == good
    with pytest.raises(CheckpointError):
        trainer.checkpoints.close()


@pytest.mark.ranks(1)
def test_a_failure_after_the_last_step_is_not_silent(tmp_path):
    trainer = make_trainer("single", tmp_path, async_save=True)
    with full_disk():
        trainer.save()
        with pytest.raises(CheckpointError, match="No space left"):
            trainer.checkpoints.close()


@pytest.mark.ranks(1)
def test_a_run_that_diverges_keeps_what_was_being_written(tmp_path):
    trainer = make_trainer("single", tmp_path, async_save=True)
    steps(trainer, 1)
    folder = trainer.save()
    with torch.no_grad():
        next(trainer.chunks[0].parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        steps(trainer, 1)
    assert read_manifest(folder, "always").step == 1


@pytest.mark.ranks(1)
def test_a_full_disk_at_the_manifest(tmp_path):
    from ling.checkpoint import publish

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = make_trainer("single", tmp_path)
    original, publish.write_manifest = publish.write_manifest, full
    try:
        with pytest.raises(CheckpointError, match="No space left on device"):
            trainer.save()
    finally:
        publish.write_manifest = original
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.ranks(1)
def test_a_folder_that_cannot_be_written(tmp_path):
    trainer = make_trainer("single", tmp_path)
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="could not be saved: rank 0: "):
        trainer.save()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("is_async", [True, False])
def test_older_checkpoints_go_when_the_newer_one_is_complete(tmp_path, is_async):
    trainer = make_trainer("DP2", tmp_path, async_save=is_async, keep_last=2, keep_every=4)
    kept = []
    for step in range(2, 14, 2):
        trainer.step = step
        folder = trainer.save()
        poll_until_done(trainer)
        kept.append([number for number, _ in checkpoints(tmp_path)])
        assert folder.is_dir()
    trainer.checkpoints.close()
    if trainer.world.rank == 0:
        assert kept == [[2], [2, 4], [4, 6], [4, 6, 8], [4, 8, 10], [4, 8, 10, 12]]
        assert len(list((tmp_path / "checkpoints").iterdir())) == 4


@pytest.mark.ranks(1)
def test_nothing_is_removed_for_a_save_that_failed(tmp_path):
    trainer = make_trainer("single", tmp_path, keep_last=1)
    trainer.step = 1
    trainer.save()
    trainer.step = 2
    with full_disk(), pytest.raises(CheckpointError):
        trainer.save()
    assert [step for step, _ in checkpoints(tmp_path)] == [1]


@pytest.mark.ranks(1)
def test_what_reads_back_other_than_written_is_no_checkpoint(tmp_path):
    from ling.checkpoint import writing

    trainer = make_trainer("single", tmp_path, keep_last=1)
    original, writing.crc32_of = writing.crc32_of, lambda path: "00000000"
    try:
        with pytest.raises(CheckpointError, match="reads back other than it was written"):
            trainer.save()
    finally:
        writing.crc32_of = original


@pytest.mark.ranks(1)
def test_leftovers_of_a_killed_save_are_swept_up(tmp_path):
    trainer = make_trainer("single", tmp_path)
    for name in (".step_00000001.partial", ".step_00000007.partial", ".step_00000003.removing"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    trainer.step = 1
    trainer.save()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.ranks(1)
def test_a_checkpoint_is_never_overwritten(tmp_path):
    trainer = make_trainer("single", tmp_path)
    folder = trainer.save()
    with pytest.raises(CheckpointError, match="there is such a checkpoint already"):
        trainer.save()
    read_manifest(folder, "always")


@pytest.mark.ranks(2)
def test_random_states_are_kept_where_they_are_used(tmp_path):
    trainer = make_trainer("DP2", tmp_path)
    trainer.chunks[0].config.hidden_dropout = 0.1
    torch.manual_seed(100 + trainer.world.rank)
    torch.rand(7)
    folder = trainer.save()
    expected = torch.rand(5)
    torch.manual_seed(0)
    trainer.load(folder)
    assert torch.equal(torch.rand(5), expected)
    assert {"random_00000.pt", "random_00001.pt"} <= set(read_manifest(folder, "always").files)


@pytest.mark.ranks(1)
def test_what_is_saved_follows_the_memory(tmp_path):
    trainer = make_trainer("single", tmp_path)
    steps(trainer, 1)
    state = trainer.checkpoints._rank_state()

    def places() -> list[int]:
        return [part.tensor.data_ptr() for part in state.model_parts() + state.moment_parts()]

    before = places()
    assert places() == before
    kept = [part.tensor for part in state.model_parts() + state.moment_parts()]  # so that no memory is used again
    for *_, main, adam in state._optimized():
        adam.state[main]["exp_avg"] = adam.state[main]["exp_avg"].clone()
        adam.state[main]["exp_avg_sq"].data = adam.state[main]["exp_avg_sq"].clone()
    for entry in state._entries.values():
        entry.tensor.data = entry.tensor.detach().clone()
    assert len(kept) == len(before)
    assert not set(places()) & set(before)


def test_the_steps_folder_has_eight_digits(tmp_path):
    assert step_folder(tmp_path, 7).name == "step_00000007"
    assert step_folder(tmp_path, 123456789).name == "step_123456789"
