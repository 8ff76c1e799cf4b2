"""The training loop, told in order."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

from ling.checkpoint import folder as checkpoint_folder
from ling.checkpoint import sharded
from ling.config import Config
from ling.config.derived import num_microbatches
from ling.config.report import to_dict
from ling.data.datasets import BatchIterator, SampleStream, eval_batches
from ling.model.forward import forward_step, take_mtp_loss
from ling.model.router import update_expert_bias
from ling.observe import console
from ling.observe.loggers import Loggers
from ling.observe.throughput import Throughput
from ling.optim.megatron import set_hyperparameters
from ling.optim.schedules import learning_rate, set_learning_rate
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
    step: int = 0
    consumed_samples: int = 0
    last_loss: float | None = None

    def __post_init__(self) -> None:
        self.forward = partial(forward_step, device=self.platform.device)
        self.num_microbatches = num_microbatches(self.config, self.world.size)
        model_config = self.chunks[0].config
        model_config.finalize_model_grads_func = finalize_step
        model_config.grad_scale_func = self.optimizer.scale_loss
        single = len(self.chunks) == 1
        if self.config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            model_config.no_sync_func = no_sync[0] if single else no_sync
        if self.config.parallel.overlap_param_gather:
            gather = [chunk.start_param_sync for chunk in self.chunks]
            model_config.param_sync_func = gather[0] if single else gather

    def run(self) -> None:
        """Train to `train.train_iters`, evaluating and saving on the way and at the end."""
        train, save_interval = self.config.train, self.config.checkpoint.save_interval
        batches = self._iterators(self.train_stream, self.consumed_samples, self.config.data.num_workers)
        self._own_garbage_collection()
        evaluated = saved = self.step
        while self.step < train.train_iters:
            record = self.train_step(batches)
            self._log_step(record)
            if train.eval_interval and self.step % train.eval_interval == 0:
                self.evaluate()
                evaluated = self.step
            if save_interval and self.step % save_interval == 0:
                self.save()
                saved = self.step
            if train.gc_interval and self.step % train.gc_interval == 0:
                gc.collect()
        if evaluated != self.step:
            self.evaluate()
        if saved != self.step:
            self.save()

    def train_step(self, batches: list[Iterator[Any]]) -> dict[str, Any]:
        """One update of the weights from one global batch; what there is to log of it.

        Raises:
            NonFiniteError: the loss or a gradient is inf or nan.
        """
        start = time.perf_counter()
        config, train = self.config, self.config.train
        lr = learning_rate(self.step + 1, config.optim, train.train_iters)
        set_learning_rate(self.optimizer, lr)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self._run_microbatches(batches, self.num_microbatches)
        losses = self._reduce(reports, take_mtp_loss())
        _, grad_norm, _ = self.optimizer.step()
        self.step += 1
        self.consumed_samples += train.global_batch_size
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
            "grad_norm": grad_norm,
            "lr": lr,
            "global_batch_size": train.global_batch_size,
            **self.throughput.measure(seconds),
            "step_ms": seconds * 1e3,
            "peak_memory_gib": self.platform.peak_memory_gib(),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss on each held-out source, over the same batches every time."""
        if not self.valid_streams:
            return {}
        for chunk in self.chunks:
            chunk.eval()
        losses = {}
        for name, stream in self.valid_streams.items():
            batches = self._iterators(stream, 0, 0)
            microbatches = self.num_microbatches * eval_batches(stream, self.config)
            reports = self._run_microbatches(batches, microbatches, forward_only=True)
            losses[name] = self._reduce(reports, None)["loss"]
        record = {"step": self.step, "eval": losses}
        self.loggers.log(record)
        self._print(console.eval_line(record))
        return losses

    def save(self) -> Path:
        """Write the checkpoint of this step."""
        self.gather_parameters()
        folder = checkpoint_folder.step_folder(self.run_dir, self.step)
        manifest = checkpoint_folder.Manifest(
            step=self.step,
            consumed_samples=self.consumed_samples,
            config=to_dict(self.config),
            world_size=self.world.size,
            versions=sharded.versions(),
            loss=self.last_loss,
        )
        sharded.save(folder, self.chunks, self.optimizer, manifest, Path(self.config.data.tokenizer))
        self._print(f"saved {folder}")
        return folder

    def gather_parameters(self) -> None:
        """Complete the weights: with overlap the next forward pass would gather what other ranks have updated."""
        if self.config.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of this run."""
        manifest = checkpoint_folder.read_manifest(folder)
        sharded.load(folder, self.chunks, self.optimizer)
        set_hyperparameters(self.optimizer, self.config.optim)  # the checkpoint brought those of the run that saved it
        self.step, self.consumed_samples, self.last_loss = manifest.step, manifest.consumed_samples, manifest.loss
        self._print(f"resumed from {folder} at step {self.step}")

    def _run_microbatches(self, batches: list[Any], count: int, forward_only: bool = False) -> list[dict[str, Any]]:
        return forward_backward(
            self.forward,
            batches,
            self.chunks,
            num_microbatches=count,
            micro_batch_size=self.config.train.micro_batch_size,
            sequence_length=self.config.data.sequence_length,
            forward_only=forward_only,
        )

    def _iterators(self, stream: SampleStream, consumed: int, num_workers: int) -> list[Iterator[Any]]:
        train, data = self.config.train, groups.data()
        return [
            BatchIterator(
                stream, train.micro_batch_size, train.global_batch_size, data.rank, data.size, consumed, num_workers
            )
            for _ in self.chunks
        ]

    def _reduce(self, reports: list[dict[str, Any]], mtp_loss: torch.Tensor | None) -> dict[str, float]:
        """Mean losses over all ranks, the same numbers on each. Ranks without a loss add nothing."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.platform.device)
        if reports:
            sums[:2] = torch.stack([report["loss"] for report in reports]).sum(0)
            if mtp_loss is not None:
                sums[2], sums[3] = mtp_loss, len(reports)
        dist.all_reduce(sums)
        loss, tokens, mtp, microbatches = sums.tolist()
        losses = {"loss": loss / tokens if tokens else math.nan}
        return losses | {"mtp_loss": mtp / microbatches} if microbatches else losses

    def _report_nonfinite(self, loss: float, grad_norm: float) -> None:
        mine = first_nonfinite(self.chunks)
        everyone: list[str | None] = [None] * self.world.size
        dist.all_gather_object(everyone, mine)
        found = [f"rank {rank}: {name}" for rank, name in enumerate(everyone) if name]
        where = f"first in the gradient of {found[0]}" if found else "in no gradient that is still in memory"
        raise NonFiniteError(f"step {self.step}: loss {loss}, gradient norm {grad_norm}; {where}")

    def _log_step(self, record: dict[str, Any]) -> None:
        self.loggers.log(record)
        interval, total = self.config.observe.log_interval, self.config.train.train_iters
        if self.step % interval == 0 or self.step == total:
            self._print(console.step_line(record, total))

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
    update_expert_bias(model)


def first_nonfinite(chunks: list[Any]) -> str | None:
    """Name of the first parameter, in the order of the model, whose gradient on this rank holds an inf or nan."""
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            grad = getattr(param, "main_grad", param.grad)
            if grad is not None and not bool(torch.isfinite(grad).all()):
                return name.removeprefix("module.").removeprefix("module.")
    return None
