"""Entry of a rank: platform, groups, data, model, optimizer, then the loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ling.config import Config
from ling.config.derived import data_parallel_size, expert_tensor_parallel_size, run_dir
from ling.config.report import non_default_values, shown, to_dict
from ling.config.rules import config_warnings
from ling.parallel import groups
from ling.platform import Platform
from ling.platform.select import Choice, choose

if TYPE_CHECKING:
    from ling.trainer import Trainer


def train(config: Config, platform: Platform) -> Trainer:
    """Run this rank to the end of the run; it continues from the run folder's newest checkpoint if there is one.

    Args:
        config: checked, with `precision.recipe` resolved.
        platform: started.
    """
    from ling.checkpoint.folder import newest

    world = groups.World.from_environment()
    groups.connect(platform, world)
    try:
        groups.build_groups(config.parallel)
        groups.seed_random_states(config.run.seed)
        folder = run_dir(config)
        checkpoint = newest(folder)
        trainer = build_trainer(config, world, platform, folder, int(checkpoint.name[-8:]) if checkpoint else 0)
        if checkpoint is not None:
            trainer.load(checkpoint)
        try:
            trainer.run()
        finally:
            trainer.loggers.close()
        return trainer
    finally:
        groups.disconnect()


def build_trainer(config: Config, world: groups.World, platform: Platform, folder: Path, resume_step: int) -> Trainer:
    """Data, model, optimizer and loggers of this rank, joined to a Trainer; prints the banner."""
    from ling.data.datasets import build_train_stream, build_valid_streams
    from ling.model.build import build_model, wrap_model
    from ling.model.counts import flops_per_token
    from ling.observe.loggers import build_loggers
    from ling.observe.throughput import Throughput, find_peak_tflops
    from ling.optim.megatron import build_optimizer
    from ling.trainer import Trainer

    choices = choose(config.runtime, platform.name)
    bf16 = config.precision.recipe == "bf16"
    operations = {name: choice.implementation for name, choice in choices.items()}
    model = build_model(config, platform.device, bf16=bf16, operations=operations)
    chunks = wrap_model(config, model, platform, bf16=bf16)
    optimizer = build_optimizer(config, chunks, bf16=bf16, use_gloo_process_groups=False)
    peak = config.observe.peak_tflops or find_peak_tflops(platform.device_name())
    tokens_per_step = config.train.global_batch_size * config.data.sequence_length
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
        throughput=Throughput(tokens_per_step, flops, world.size, peak),
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
