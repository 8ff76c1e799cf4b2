"""The training loop, told in order."""

from __future__ import annotations

import gc
import math
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

from ling.checkpoint.manager import CheckpointManager, Position
from ling.config import Config
from ling.config.derived import global_batch_size_at, num_microbatches
from ling.data.datasets import BatchIterator, SampleStream, eval_batches
from ling.job.control import JobControl
from ling.job.files import node_name
from ling.job.progress import LOSS_SUM
from ling.model.forward import forward_step, take_mtp_loss
from ling.model.router import update_expert_bias
from ling.model.scalars import sum_scalar_gradients
from ling.observe import console, stragglers
from ling.observe.loggers import Loggers
from ling.observe.throughput import Throughput
from ling.optim.megatron import set_hyperparameters
from ling.optim.schedules import learning_rate, recovery_factor, set_learning_rate
from ling.parallel import groups
from ling.parallel.schedule import forward_backward
from ling.platform import Platform


class NonFiniteError(RuntimeError):
    """The loss or a gradient is inf or nan; the weights in memory are no longer good, the last checkpoint is."""


@dataclass
class Trainer:
    """A run on one rank: everything built, ready to step.

    `step` counts the updates made, `consumed_samples` the samples that they have seen; both continue on resume.
    """

    config: Config
    world: groups.World
    platform: Platform
    run_dir: Path
    chunks: list[Any]
    optimizer: Any
    train_stream: SampleStream
    valid_streams: dict[str, SampleStream]
    loggers: Loggers
    throughput: Throughput
    job: JobControl = field(default_factory=JobControl)
    step: int = 0
    consumed_samples: int = 0
    last_loss: float | None = None
    origin: dict[str, Any] | None = None
    """`{checkpoint, step}` that the run began from, where `checkpoint.load` named one."""
    owes_evaluation: bool = False
    """Whether the step that this run continues from was not evaluated, though it should have been."""

    def __post_init__(self) -> None:
        self.num_microbatches = num_microbatches(self.config, self.world.size)  # of the full global batch
        self._data_sum = 0
        self.checkpoints = CheckpointManager(
            self.config, self.run_dir, self.chunks, self.optimizer, self._print, self._log_event
        )
        model_config = self.chunks[0].config
        model_config.finalize_model_grads_func = finalize_step
        model_config.grad_scale_func = self.optimizer.scale_loss
        self.stragglers = stragglers.Stragglers(self.config.observe, self.world, self.platform, node_name())
        model_config.timers = self.stragglers.timers()
        single = len(self.chunks) == 1
        if self.config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            model_config.no_sync_func = no_sync[0] if single else no_sync
        if self.config.parallel.overlap_param_gather:
            gather = [chunk.start_param_sync for chunk in self.chunks]
            model_config.param_sync_func = gather[0] if single else gather

    @property
    def is_stopped(self) -> bool:
        """Whether the run ends here on purpose, before its last step."""
        return self.job.cause is not None and self.step < self.config.train.train_iters

    def run(self) -> None:
        """Train to `train.train_iters`, evaluating and saving on the way and at the end; or until the job must stop."""
        train, save_interval = self.config.train, self.config.checkpoint.save_interval
        batches = self._iterators(self.train_stream, self.consumed_samples, self.config.data.num_workers)
        self._own_garbage_collection()
        evaluated = saved = self.step
        self.checkpoints.exports.resume(self.step)
        if self.owes_evaluation:
            self.evaluate()
        while self.step < train.train_iters and not self.is_stopped:
            start = time.monotonic()
            record = self.train_step(batches)
            self._log_step(record)
            self._name_stragglers()
            self.checkpoints.poll()
            self.evaluate_merge()
            if not self.is_stopped and train.eval_interval and self.step % train.eval_interval == 0:
                self.evaluate()
                evaluated = self.step
            self.job.deadline.measured_step(self._growth(record) * (time.monotonic() - start))
            if save_interval and self.step % save_interval == 0:
                self._save_timed(final=self.step == train.train_iters or self.is_stopped)
                saved = self.step
                self.evaluate_merge()
            if train.gc_interval and self.step % train.gc_interval == 0:
                gc.collect()
        if evaluated != self.step and not self.is_stopped:
            self.evaluate()
        if saved != self.step:
            self._save_timed(final=True)
        self.checkpoints.close()
        self.evaluate_merge()
        self._finish_exports()

    def train_step(self, batches: list[Iterator[Any]]) -> dict[str, Any]:
        """One update of the weights from one global batch; what there is to log of it.

        Raises:
            NonFiniteError: the loss or a gradient is inf or nan.
        """
        start = time.perf_counter()
        config, train = self.config, self.config.train
        batch_size = global_batch_size_at(config, self.consumed_samples)
        self.job.progress.mark("forward and backward", self.step + 1)
        lr = learning_rate(self.step + 1, config.optim, train.train_iters)
        if self.origin is not None:
            lr *= recovery_factor(self.step + 1 - self.origin["step"], train)
        set_learning_rate(self.optimizer, lr)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._data_sum = 0
        self.stragglers.begin_step()
        microbatches = num_microbatches(config, self.world.size, batch_size)
        reports = self._run_microbatches(self._checked(batches), microbatches)
        self.job.progress.mark(LOSS_SUM)
        losses, data_crc32 = self._reduce(reports, take_mtp_loss(), self._data_sum)
        if self.checkpoints.must_wait(self.step + 1):
            self.job.progress.mark("waiting for a save", is_slow=True)
            self.checkpoints.wait()
        self.job.progress.mark("optimizer")
        _, grad_norm, _ = self.optimizer.step()
        self.step += 1
        self.consumed_samples += batch_size
        if not (math.isfinite(losses["loss"]) and math.isfinite(grad_norm)):
            self._report_nonfinite(losses["loss"], grad_norm)
        self.last_loss = losses["loss"]
        self.platform.synchronize()
        seconds = time.perf_counter() - start
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_samples * config.data.sequence_length,
            **losses,
            "data_crc32": data_crc32,
            "grad_norm": grad_norm,
            "lr": lr,
            "global_batch_size": batch_size,
            **self.throughput.measure(batch_size * config.data.sequence_length, seconds),
            "step_ms": seconds * 1e3,
            "peak_memory_gib": self.platform.peak_memory_gib(),
        }

    @torch.no_grad()
    def evaluate(self, suffix: str = "", **more: Any) -> dict[str, float]:
        """Mean loss on each held-out source, over the same batches every time; `suffix` and `more` are for the log."""
        if not self.valid_streams:
            return {}
        for chunk in self.chunks:
            chunk.eval()
        losses = {}
        for name, stream in self.valid_streams.items():
            self.job.progress.mark(f"evaluation of {name}")
            batches = self._iterators(stream, 0, 0)
            microbatches = self.num_microbatches * eval_batches(stream, self.config)
            reports = self._run_microbatches(batches, microbatches, forward_only=True)
            losses[name + suffix] = self._reduce(reports, None)[0]["loss"]
        record = {"step": self.step, "eval": losses, **more}
        self.loggers.log(record)
        self._print(console.eval_line(record))
        return losses

    def evaluate_merge(self) -> dict[str, float]:
        """Where a checkpoint was completed: the losses of the newest ones' merge. The weights are put back after it."""
        settings = self.config.checkpoint
        if settings.merge_eval_last is None or self.is_stopped or not self.checkpoints.take_completed():
            return {}
        with self.checkpoints.merged(settings.merge_eval_last, settings.merge_eval_schedule) as steps:
            return self.evaluate(f" (merge of {len(steps)})", merged=steps) if steps else {}

    def save(self, final: bool = False) -> Path:
        """Write the checkpoint of this step; `final`: the process ends after it, so not in the background.

        Raises:
            CheckpointError: it could not be written, and the run must not go on.
        """
        self.gather_parameters()
        position = Position(self.step, self.consumed_samples, self.last_loss, self.origin)
        return self.checkpoints.save(position, final)

    def gather_parameters(self) -> None:
        """Complete the weights: with overlap the next forward pass would gather what other ranks have updated."""
        if self.config.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def load(self, folder: Path, is_own: bool = True) -> None:
        """Continue from a checkpoint of this run; or begin from another run's, with what `checkpoint.load_*` say."""
        settings = self.config.checkpoint
        manifest = self.checkpoints.load(folder, moments=is_own or settings.load_optimizer)
        set_hyperparameters(self.optimizer, self.config.optim)
        if is_own or settings.load_step:
            self.step, self.consumed_samples, self.last_loss = manifest.step, manifest.consumed_samples, manifest.loss
        if is_own:
            self.origin = manifest.origin
            self.checkpoints.restore_random_states(folder, manifest)
            self._print(f"resumed from {folder} at step {self.step}")
        else:
            self.origin = {"checkpoint": str(folder), "step": self.step}
            optimizer = "with" if settings.load_optimizer else "without"
            self._print(f"began from {folder} {optimizer} its optimizer, at step {self.step}")

    def _growth(self, record: dict[str, Any]) -> float:
        """How many times as large as the step just made the one after the next is: that one must fit before a stop."""
        following = self.consumed_samples + global_batch_size_at(self.config, self.consumed_samples)
        return global_batch_size_at(self.config, following) / int(record["global_batch_size"])

    def _save_timed(self, final: bool) -> None:
        start = time.monotonic()
        self.job.progress.mark("saving", is_slow=True)
        self.save(final)
        self.job.deadline.measured_save(max(time.monotonic() - start, self.checkpoints.last_save_s))

    def _finish_exports(self) -> None:
        """Wait for exports in the background, unless the job has to stop."""
        self.job.progress.mark("waiting for exports", is_slow=True)
        while not self.checkpoints.all_exported(self.is_stopped or any(self.job.wishes())):
            self.job.progress.tick()

    def _run_microbatches(self, batches: list[Any], count: int, forward_only: bool = False) -> list[dict[str, Any]]:
        return forward_backward(
            self._forward,
            batches,
            self.chunks,
            num_microbatches=count,
            micro_batch_size=self.config.train.micro_batch_size,
            sequence_length=self.config.data.sequence_length,
            forward_only=forward_only,
        )

    def _checked(self, batches: list[Iterator[Any]]) -> list[Iterator[Any]]:
        """The same micro-batches, summing the CRC-32 of their samples: once for each, on the first rank that has it."""
        if groups.tensor().rank or groups.pipeline().rank:
            return batches

        def summing(batches: Iterator[Any]) -> Iterator[Any]:
            for batch in batches:
                self._data_sum += sum(zlib.crc32(tokens) for tokens in batch["tokens"].numpy())
                yield batch

        return [summing(batches[0]), *batches[1:]]

    def _iterators(self, stream: SampleStream, consumed: int, num_workers: int) -> list[Iterator[Any]]:
        train, data = self.config.train, groups.data()
        return [
            BatchIterator(
                stream, train.micro_batch_size, train.global_batch_size, data.rank, data.size, consumed, num_workers
            )
            for _ in self.chunks
        ]

    def _forward(self, batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        self.job.progress.tick()
        return forward_step(batches, model, self.platform.device)

    def _reduce(
        self, reports: list[dict[str, Any]], mtp_loss: torch.Tensor | None, data_sum: int = 0
    ) -> tuple[dict[str, float], str]:
        """Mean losses over all ranks and the checksum of their data, the same on each; ranks without a loss add
        nothing. All ranks learn here, at the same moment, whether one of them wishes to stop."""
        told = [float(data_sum), *self.job.wishes()]
        sums = torch.tensor([0.0] * 4 + told, dtype=torch.float64, device=self.platform.device)
        if reports:
            sums[:2] = torch.stack([report["loss"] for report in reports]).sum(0)
            if mtp_loss is not None:
                sums[2], sums[3] = mtp_loss, len(reports)
        dist.all_reduce(sums)
        loss, tokens, mtp, microbatches, checksum, *wishes = sums.tolist()
        self.job.agree(wishes)
        losses = {"loss": loss / tokens if tokens else math.nan}
        if microbatches:
            losses["mtp_loss"] = mtp / microbatches
        return losses, f"{int(checksum) % 2**32:08x}"  # exact: sums of up to 2^21 samples stay below 2^53

    def _report_nonfinite(self, loss: float, grad_norm: float) -> None:
        mine = first_nonfinite(self.chunks)
        everyone: list[str | None] = [None] * self.world.size
        dist.all_gather_object(everyone, mine)
        found = [f"rank {rank}: {name}" for rank, name in enumerate(everyone) if name]
        where = f"first in the gradient of {found[0]}" if found else "in no gradient that is still in memory"
        self.checkpoints.wait()  # what is being written in the background is of the time before
        raise NonFiniteError(f"step {self.step}: loss {loss}, gradient norm {grad_norm}; {where}")

    def _log_step(self, record: dict[str, Any]) -> None:
        self.loggers.log(record)
        interval, total = self.config.observe.log_interval, self.config.train.train_iters
        if self.step % interval == 0 or self.step == total:
            self._print(console.step_line(record, total))

    def _log_event(self, record: dict[str, Any]) -> None:
        self.loggers.log({"step": self.step, **record})

    def _name_stragglers(self) -> None:
        self.job.progress.mark("comparing the ranks' times")
        record = self.stragglers.end_step(self.step)
        if record is not None:
            self.loggers.log(record)
            if (line := stragglers.console_line(record)) is not None:
                self._print(line)

    def _own_garbage_collection(self) -> None:
        """From here on garbage is collected between steps, at the same step on all ranks, not whenever Python likes."""
        if self.config.train.gc_interval:
            gc.collect()
            gc.disable()

    def _print(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


def finalize_step(model: list[Any], num_tokens: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    """After the last micro-batch: reduce the gradients over all groups, then move the routers' biases."""
    finalize_model_grads(model, num_tokens, *args, **kwargs)
    sum_scalar_gradients(model)
    update_expert_bias(model)


def first_nonfinite(chunks: list[Any]) -> str | None:
    """Name of the first parameter, in the order of the model, whose gradient on this rank holds an inf or nan."""
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            grad = getattr(param, "main_grad", param.grad)
            if grad is not None and not bool(torch.isfinite(grad).all()):
                return name.removeprefix("module.").removeprefix("module.")
    return None
