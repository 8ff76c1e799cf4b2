"""Entry of a rank: groups, watchdog, the run's folder, data, model, optimizer, then the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from ling.config import Config
from ling.config.derived import data_parallel_size, expert_tensor_parallel_size
from ling.config.report import non_default_values, shown, to_dict
from ling.config.rules import config_warnings
from ling.job.board import Board
from ling.job.rank import RankJob
from ling.job.start import begin
from ling.parallel import groups
from ling.platform import Platform
from ling.platform.select import Choice, choose_for

if TYPE_CHECKING:
    from ling.trainer import Trainer


def train(config: Config, platform: Platform, job: RankJob, claim: Callable[[], None], started: float) -> Trainer:
    """Run this rank to the end of the run, or until the job has to stop; it continues from the run folder's newest
    checkpoint if there is one.

    Args:
        config: checked, with `precision.recipe` resolved.
        platform: started.
        claim: makes the run's folder this job's own; called on rank 0.
        started: when this process began, as `time.monotonic` has it.
    """
    from ling.checkpoint.folder import newest
    from ling.checkpoint.manager import CheckpointError
    from ling.trainer import NonFiniteError

    world = groups.World.from_environment()
    groups.connect(platform, world)
    job.watch(Board.connect(world.size), config.train.hang_timeout)
    beginning = begin(config, job, claim, started)
    job.control.progress.mark("building", is_slow=True)
    groups.build_groups(config.parallel)
    groups.seed_random_states(config.run.seed)
    trainer = build_trainer(config, world, platform, job.run_dir, beginning.step)
    trainer.job, trainer.owes_evaluation = job.control, beginning.owes_evaluation
    try:
        if beginning.attempt is not None:
            trainer.loggers.set_attempt(beginning.attempt)
        if beginning.checkpoint is not None:
            job.control.progress.mark("loading", is_slow=True)
            trainer.load(beginning.checkpoint.folder, beginning.checkpoint.is_own)
        if job.attempt is not None:
            job.attempt.first_step()
        trainer.run()
    except (NonFiniteError, CheckpointError):  # raised on all ranks at once
        raise
    except Exception as error:
        job.note(error)
        raise
    finally:
        trainer.loggers.close()
    dist.barrier()
    job.end("stopped" if trainer.is_stopped else "done", trainer.step, newest(job.run_dir))
    groups.disconnect()
    return trainer


def build_trainer(config: Config, world: groups.World, platform: Platform, folder: Path, resume_step: int) -> Trainer:
    """Data, model, optimizer and loggers of this rank, joined to a Trainer; prints the banner."""
    from ling.data.datasets import build_train_stream, build_valid_streams
    from ling.model.build import build_model, wrap_model
    from ling.model.counts import flops_per_token
    from ling.observe.loggers import build_loggers
    from ling.observe.throughput import Throughput, find_peak_tflops
    from ling.optim.megatron import build_optimizer
    from ling.trainer import Trainer

    choices = choose_for(config, platform.name)
    bf16 = config.precision.recipe != "fp32"
    operations = {name: choice.implementation for name, choice in choices.items()}
    model = build_model(config, platform.device, bf16=bf16, operations=operations)
    chunks = wrap_model(config, model, platform, bf16=bf16)
    optimizer = build_optimizer(config, chunks, bf16=bf16, use_gloo_process_groups=False)
    peak = config.observe.peak_tflops or find_peak_tflops(platform.device_name())
    flops = flops_per_token(config.model, config.data.sequence_length).total
    if world.is_main:
        print(_banner(config, world, platform, list(choices.values())), flush=True)
    return Trainer(
        config=config,
        world=world,
        platform=platform,
        run_dir=folder,
        chunks=chunks,
        optimizer=optimizer,
        train_stream=build_train_stream(config),
        valid_streams=build_valid_streams(config),
        loggers=build_loggers(config, folder, resume_step, world.is_main, to_dict(config)),
        throughput=Throughput(flops, world.size, peak),
    )


def _banner(config: Config, world: groups.World, platform: Platform, choices: list[Choice]) -> str:
    from ling.model.counts import count_parameters
    from ling.observe.console import banner

    parallel, count = config.parallel, count_parameters(config.model)
    layout = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "ETP": expert_tensor_parallel_size(parallel),
        "DP": data_parallel_size(parallel, world.size),
    }
    return banner(
        name=config.run.name,
        parameters={"total": count.total, "activated": count.activated},
        layout=layout,
        devices=f"{world.size} x {platform.device_name()} ({platform.name})",
        precision=config.precision.recipe,
        choices=choices,
        changes=[
            f"{key} = {shown(value)} (default {shown(default)})" for key, value, default in non_default_values(config)
        ],
        notes=config_warnings(config),
    )
