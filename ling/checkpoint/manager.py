"""The checkpoints of a run: saving now or in the background, loading, and keeping as many as are wanted."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ling.checkpoint import random_states
from ling.checkpoint.control import Control
from ling.checkpoint.exports import Exports, exports_run
from ling.checkpoint.folder import (
    Manifest,
    checkpoints,
    copy_tokenizer,
    partial_folder,
    read_manifest,
    step_folder,
)
from ling.checkpoint.merge import average_parts, weights_of_schedule
from ling.checkpoint.names import scalars_kind
from ling.checkpoint.parts import Part, RankState
from ling.checkpoint.publish import publish
from ling.checkpoint.retention import leftovers, remove, retire
from ling.checkpoint.torch_dist import Item, Reader, write_index
from ling.checkpoint.versions import git_commit, versions
from ling.checkpoint.writing import Job, Plan, Staging, Written, files_of, make_plan
from ling.config import Config, UserError
from ling.config.derived import activation_for
from ling.config.load import from_dict
from ling.config.report import to_dict
from ling.parallel.groups import World

_MAX_THREADS = 4
_EXPORT_POLL_S = 1.0


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved: the run must end, for it would go on without a way back."""


@dataclass
class Position:
    """Where a run stands when it is saved; see `Manifest`."""

    step: int
    consumed_samples: int
    loss: float | None = None
    origin: dict[str, Any] | None = None


@dataclass
class _Save:
    """A save that is under way."""

    position: Position
    folder: Path
    job: Job
    optimizer_step: int
    is_async: bool
    started: float


class CheckpointManager:
    """Saves and loads the state of a run. All ranks make the same calls in the same order.

    Args:
        config: the run; the `checkpoint` branch, `data.tokenizer`, and all of it for the manifest.
        run_dir: the run's folder.
        chunks: this rank's model chunks.
        optimizer: megatron-core's.
        announce: takes each line that the user should read; what it does on ranks other than 0 is its own affair.
        log: takes records for the run's metrics.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        chunks: list[Any],
        optimizer: Any,
        announce: Callable[[str], None],
        log: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self._config, self._run_dir, self._announce = config, run_dir, announce
        self._chunks, self._optimizer = chunks, optimizer
        self._control = Control()
        self.exports = Exports(config, run_dir, self._control.rank == 0, announce, log)
        self._state: RankState | None = None
        self._plan: Plan | None = None
        self._staging: Staging | None = None
        self._under_way: _Save | None = None
        self.last_save_s = 0.0
        """How long the latest save took until it was complete."""
        self._failed: str | None = None
        self._has_completed = False
        self._remover: threading.Thread | None = None
        cores = len(os.sched_getaffinity(0)) // World.from_environment().local_size
        self._threads = max(1, min(_MAX_THREADS, cores))

    def save(self, position: Position, final: bool = False) -> Path:
        """Write a checkpoint, in the background where `checkpoint.async_save` says so.

        One save at a time: an earlier one that is still being written is waited for. After a failure in the
        background, the next save is a synchronous one.

        Args:
            position: step, samples, loss.
            final: nothing comes after it: save synchronously.

        Raises:
            CheckpointError: a synchronous save failed; on every rank.
        """
        self._finish()
        folder = step_folder(self._run_dir, position.step)
        is_async = self._config.checkpoint.async_save and not final and self._failed is None
        started = time.perf_counter()
        parts = self._parts()
        if self._plan is None:
            self._plan = make_plan(parts, self._control)
        mine = [parts[index] for index in self._plan.mine]
        if is_async:
            self._staging = self._staging or Staging(mine)
            items = self._staging.copy(mine)
        else:
            items = [Item(part.key, part.start, part.tensor) for part in mine]
        try:
            self._control.from_main(lambda: self._prepare(folder))
        except OSError as error:
            self._give_up(folder, f"rank 0: {error.strerror}: {error.filename}", is_async)
            return folder
        job = self._start(partial_folder(folder), items)
        self._under_way = _Save(position, folder, job, self._rank_state().optimizer_step, is_async, started)
        if not is_async:
            self._finish()
        return folder

    def poll(self) -> None:
        """Complete a save in the background that all ranks have written. Call it after every step.

        A save that failed is reported, and the next one will be synchronous. So is an export that ended.
        """
        self.exports.poll()
        if self._under_way is not None and self._control.all_true(self._under_way.job.is_done):
            self._finish()

    def must_wait(self, step: int) -> bool:
        """Whether a save in the background has to be complete before `step` is made; the same on all ranks.

        A crash after it would cost more than `checkpoint.max_lost_steps`: the checkpoint before is an interval older.
        """
        settings = self._config.checkpoint
        if self._under_way is None or settings.max_lost_steps is None:
            return False
        return step - (self._under_way.position.step - settings.save_interval) > settings.max_lost_steps

    def wait(self) -> None:
        """Complete a save in the background, waiting for it; a failure is reported as by `poll`."""
        self._finish()

    def close(self) -> None:
        """Wait for what is under way, at the end of the run.

        Raises:
            CheckpointError: the last save failed; on every rank.
        """
        self._finish()
        if self._remover is not None:
            self._remover.join()
        if self._failed is not None:
            raise CheckpointError(self._failed)

    def all_exported(self, must_stop: bool) -> bool:
        """Wait a moment for exports; whether all are done. With `must_stop` they are left to the run's next start.

        Checkpoints that were kept for them alone go then.
        """
        if not exports_run(self._config.checkpoint):
            return True
        if must_stop:
            self.exports.stop()
        if not self._control.all_true(self.exports.wait(_EXPORT_POLL_S)):
            return False
        if not must_stop:
            self._retire()
            if self._remover is not None:
                self._remover.join()
        return True

    def load(self, folder: Path, *, moments: bool = True) -> Manifest:
        """Read weights and, with `moments`, the optimizer's state into this rank's tensors.

        Returns:
            The checkpoint's manifest.

        Raises:
            UserError: on some rank tensors are missing, of another shape, or damaged; raised on all of them.
        """
        manifest = read_manifest(folder, "never")  # whoever chose it has looked at its files
        state = self._rank_state()
        parts = state.model_parts() + state.master_parts() + (state.moment_parts() if moments else [])
        others = self._other_activations(manifest)
        wanted = [part for part in parts if not (part.is_optional and scalars_kind(part.sources[-1]) in others)]
        left_out = [part.key for part in state.model_parts() if scalars_kind(part.key) in others]
        problem: UserError | None = None
        try:
            left_out += Reader(folder, self._threads).load(wanted)
        except UserError as error:
            problem = error
        by_rank = self._control.everyone((left_out, problem))
        for _, problem in by_rank:
            if problem is not None:
                raise problem
        names = sorted({name for names, _ in by_rank for name in names})
        if names:
            self._announce(f"not in {folder}, so as the run began: {', '.join(names)}")
        if moments and manifest.optimizer_step is not None:
            state.optimizer_step = manifest.optimizer_step
        return manifest

    def take_completed(self) -> bool:
        """Whether a checkpoint was completed since this was asked the last time; the same on all ranks."""
        answer, self._has_completed = self._has_completed, False
        return answer

    @contextmanager
    @torch.no_grad()
    def merged(self, last: int, schedule: str) -> Iterator[list[int]]:
        """For the length of a `with`, the model has the merged weights of the newest checkpoints.

        This rank needs memory for three copies of its part of the model: its own weights, the sum, and a checkpoint's.

        Args:
            last: so many checkpoints.
            schedule: see `ling.checkpoint.merge`.

        Yields:
            The steps that were merged; none, and the model as it is, where there are not so many checkpoints yet.
        """
        found = self._control.from_main(lambda: checkpoints(self._run_dir)[-last:])
        if len(found) < last:
            yield []
            return
        steps = [step for step, _ in found]
        parts = self._rank_state().model_parts()
        own = [part.tensor.clone() for part in parts]
        sums = average_parts(parts, [path for _, path in found], weights_of_schedule(steps, schedule), self._threads)
        try:
            for part, merged in zip(parts, sums, strict=True):
                part.tensor.copy_(merged)
            del sums
            yield steps
        finally:
            for part, kept in zip(parts, own, strict=True):
                part.tensor.copy_(kept)

    def restore_random_states(self, folder: Path, manifest: Manifest) -> None:
        """Continue the random numbers of a checkpoint of this run, if it draws any and has the same ranks."""
        if not manifest.random_states:
            return
        before, now = manifest.config["parallel"], to_dict(self._config)["parallel"]
        if manifest.world_size == self._control.size and before == now:
            random_states.restore(folder / random_states.file_of(self._control.rank))
        else:
            self._announce("random states start anew: those of the checkpoint belong to another layout")

    def _other_activations(self, manifest: Manifest) -> set[str | None]:
        """Kinds of FFN that have another activation here than in a checkpoint, whose scalars mean nothing here."""
        saved, model = from_dict(manifest.config, "the checkpoint").model, self._config.model
        return {
            kind
            for kind in ("dense", "shared", "routed")
            if activation_for(saved, kind)["name"] != activation_for(model, kind)["name"]
        }

    def _rank_state(self) -> RankState:
        if self._state is None:
            self._state = RankState(self._chunks, self._optimizer)
        return self._state

    def _parts(self) -> list[Part]:
        state = self._rank_state()
        return state.model_parts() + state.master_parts() + state.moment_parts()

    def _prepare(self, folder: Path) -> None:
        """Rank 0: sweep up, and make the folder to write into."""
        if folder.exists():
            raise FileExistsError(None, "there is such a checkpoint already", str(folder))
        if self._remover is not None:
            self._remover.join()
        remove(leftovers(self._run_dir))
        partial_folder(folder).mkdir(parents=True)

    def _start(self, partial: Path, items: list[Item]) -> Job:
        rank, settings = self._control.rank, self._config.checkpoint
        files = files_of(items, rank, self._threads)
        objects = [Item(key, None, value) for key, value in self._rank_state().objects.items()]
        if objects:
            files.setdefault(f"__{rank}_0.distcp", []).extend(objects)
        if random_states.draws_numbers(self._chunks):
            name = random_states.file_of(rank)
            files[name] = [Item(name, None, random_states.capture())]
        # older checkpoints are removed for this one: see that it can be read
        read_back = settings.keep_last is not None and settings.verify == "always"
        return Job(partial, files, read_back)

    def _finish(self) -> None:
        """Wait for the save under way, and make a checkpoint of what all ranks have written."""
        save, self._under_way = self._under_way, None
        if save is None:
            return
        written = self._control.gather((save.job.wait(), save.optimizer_step))
        try:
            self._control.from_main(lambda: self._complete(save, written))
        except (OSError, CheckpointError) as error:
            self._give_up(save.folder, str(error), save.is_async)
            return
        self._failed, self._has_completed = None, True
        seconds = time.perf_counter() - save.started
        self.last_save_s = seconds
        self._announce(f"saved {save.folder}" + (f" in the background, {seconds:.1f} s" if save.is_async else ""))
        self.exports.completed(save.position.step, save.folder)
        self._retire()

    def _complete(self, save: _Save, by_rank: list[tuple[Written, int]]) -> None:
        """Rank 0: make a checkpoint of the files, or give the room back that they take."""
        try:
            self._describe(save, by_rank)
        except BaseException:
            remove([partial_folder(save.folder)])
            raise

    def _describe(self, save: _Save, by_rank: list[tuple[Written, int]]) -> None:
        """Index, tokenizer and manifest; then the checkpoint gets its name."""
        errors = [f"rank {rank}: {written.error}" for rank, (written, _) in enumerate(by_rank) if written.error]
        if errors:
            raise CheckpointError(errors[0] + (f" (and {len(errors) - 1} more ranks)" if errors[1:] else ""))
        assert self._plan is not None
        partial, config = partial_folder(save.folder), self._config
        stored = [each for written, _ in by_rank for each in written.stored]
        objects = [each for each in stored if each.start is None and each.file.endswith(".distcp")]
        write_index(partial, self._plan.tensors(stored), objects)
        copy_tokenizer(Path(config.data.tokenizer), partial)
        files = {name: record for written, _ in by_rank for name, record in written.files.items()}
        manifest = Manifest(
            step=save.position.step,
            consumed_samples=save.position.consumed_samples,
            config=to_dict(config),
            world_size=self._control.size,
            versions=versions(),
            loss=save.position.loss,
            optimizer_step=max(step for _, step in by_rank),
            origin=save.position.origin,
            random_states=any(name.startswith("random_") for name in files),
            git_commit=git_commit(),
            saved_at=time.time(),
        )
        publish(partial, save.folder, manifest, files)

    def _give_up(self, folder: Path, reason: str, is_async: bool) -> None:
        self._failed = f"{folder} could not be saved: {reason}"
        if not is_async:
            raise CheckpointError(self._failed)
        self._announce(f"warning: {self._failed}; the next save will not be in the background")

    def _retire(self) -> None:
        """Rank 0: rename what need not be kept; it is deleted while the run goes on."""
        settings = self._config.checkpoint
        if self._control.rank != 0 or settings.keep_last is None:
            return
        try:
            retired = retire(self._run_dir, settings.keep_last, settings.keep_every, self.exports.pending)
        except (OSError, UserError) as error:
            self._announce(f"warning: older checkpoints were not removed: {error}")
            return
        if retired:
            self._remover = threading.Thread(target=remove, args=(retired,), daemon=True, name="remove checkpoints")
            self._remover.start()
