"""`ling`'s model of a config on this process alone, without weights."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from ling.config.schema import Config, ParallelConfig, RuntimeConfig
from ling.model.build import LingModel, build_model
from ling.parallel import groups
from ling.platform import get_platform
from ling.platform.select import choose_for


def model_without_weights(config: Config) -> LingModel:
    """The whole model on the meta device, in fp32 and ready to evaluate on the CPU."""
    platform = get_platform("cpu")
    config = dataclasses.replace(
        config,
        parallel=ParallelConfig(),
        runtime=RuntimeConfig(platform="cpu"),
        precision=dataclasses.replace(config.precision, recipe="fp32"),
    )
    if not dist.is_initialized():
        groups.connect(platform, groups.World(0, 1, 0, 1))
    groups.build_groups(config.parallel)
    groups.seed_random_states(config.run.seed)
    operations = {name: choice.implementation for name, choice in choose_for(config, "cpu").items()}
    (model,) = build_model(config, torch.device("meta"), bf16=False, operations=operations)
    return model.eval()
