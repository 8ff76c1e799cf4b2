"""Settings of a run: typed schema, loading with bases and overrides, rules between settings, reports. Without torch."""

from ling.config.errors import UserError
from ling.config.load import load_config
from ling.config.report import diff, non_default_values, save_config, to_dict, to_yaml
from ling.config.rules import check_config
from ling.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LaunchConfig,
    ModelConfig,
    ObserveConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LaunchConfig",
    "ModelConfig",
    "ObserveConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "RuntimeConfig",
    "TrainConfig",
    "UserError",
    "check_config",
    "diff",
    "load_config",
    "non_default_values",
    "save_config",
    "to_dict",
    "to_yaml",
]
