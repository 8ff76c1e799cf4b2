"""A checkpoint as a model on one rank, for evaluation and generation."""

from __future__ import annotations

from pathlib import Path

from ling.checkpoint.folder import Manifest, read_manifest, resolve
from ling.config.load import from_dict
from ling.config.plugins import load_plugins
from ling.config.schema import Config, ParallelConfig
from ling.model.build import LingModel, build_model
from ling.parallel import groups
from ling.platform import Platform
from ling.platform.select import choose_for


def saved_config(path: Path, device: str = "auto") -> tuple[Path, Manifest, Config]:
    """The checkpoint folder that a path means, its manifest, and the config that it was saved with.

    Args:
        path: a checkpoint, or a run's folder (its newest checkpoint).
        device: takes the place of `runtime.platform`; layout and operations are chosen anew for one rank here.

    Raises:
        UserError: there is no complete checkpoint.
    """
    folder = resolve(path)
    manifest = read_manifest(folder)
    config = from_dict(manifest.config, str(folder))
    load_plugins(config.run.plugins)
    config.parallel = ParallelConfig()
    config.runtime.platform, config.runtime.attention, config.runtime.grouped_gemm = device, "auto", "auto"
    return folder, manifest, config


def restore_model(folder: Path, config: Config, platform: Platform) -> LingModel:
    """Build the model of a checkpoint on this process alone, with its weights, ready to evaluate."""
    from ling.checkpoint.parts import RankState
    from ling.checkpoint.torch_dist import Reader

    groups.connect(platform, groups.World(0, 1, 0, 1))
    groups.build_groups(config.parallel)
    groups.seed_random_states(config.run.seed)
    operations = {name: choice.implementation for name, choice in choose_for(config, platform.name).items()}
    bf16 = config.precision.recipe != "fp32"
    model = build_model(config, platform.device, bf16=bf16, operations=operations)[0]
    Reader(folder).load(RankState([model]).model_parts())
    return model.eval()
