"""The optimizer of a run, built by megatron-core: sharded over data parallelism, mixed precision, gradient clipping."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Sequence
from typing import Any

import megatron.core
import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from ling.config.schema import Config, OptimConfig
from ling.optim.adamw import AdamW

# Where megatron-core found neither Transformer Engine nor Apex: module, name, and what our AdamW needs it to be. The
# last two say that the step stands in the parameter group and that a parameter's state is made of moments alone; which
# of the two packages is named makes no difference, and Apex is the one that promises no more than that.
_REPLACED: tuple[tuple[str, str, Any], ...] = (
    ("megatron.core.optimizer", "Adam", AdamW),
    ("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER", False),
    ("megatron.core.optimizer.distrib_optimizer", "Adam", AdamW),
    ("megatron.core.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE", True),
    ("megatron.core.optimizer.distrib_optimizer", "USING_APEX_OPTIMIZER", True),
)


def use_our_adam() -> None:
    """Put `AdamW` in place of megatron-core's `Adam`, unless Transformer Engine or Apex supplies one. Idempotent.

    Raises:
        RuntimeError: a name that is to be replaced does not exist in the installed megatron-core.
    """
    for module, name, _ in _REPLACED:
        if not hasattr(importlib.import_module(module), name):
            raise RuntimeError(
                f"megatron-core {megatron.core.__version__} has no {module}.{name}, which our AdamW replaces; "
                "install a supported version (see pyproject.toml)"
            )
    # False with Transformer Engine or Apex, and after the first call
    if not mcore_optimizer.USING_PYTORCH_OPTIMIZER:
        return
    for module, name, value in _REPLACED:
        setattr(importlib.import_module(module), name, value)


def build_optimizer(
    config: Config,
    model_chunks: Sequence[torch.nn.Module],
    *,
    bf16: bool,
    use_gloo_process_groups: bool = True,
) -> MegatronOptimizer:
    """The run's optimizer over this rank's model chunks.

    The learning rate is 0 until `schedules.set_learning_rate` writes one, as it must before each step.

    Args:
        config: the run; its `optim` and `parallel` branches are read.
        model_chunks: megatron-core's DistributedDataParallel modules, one per virtual pipeline stage.
        bf16: the weights are bf16 and fp32 master weights are kept (the resolved precision recipe).
        use_gloo_process_groups: whether megatron-core's gloo data-parallel groups were made.

    Raises:
        RuntimeError: see `use_our_adam`.
    """
    use_our_adam()
    optim = config.optim
    mcore_config = OptimizerConfig(
        optimizer="adam",
        # The schedule writes the rates. megatron-core puts these two into the parameter groups as max_lr and min_lr,
        # and 0.19 finds a checkpoint's groups by them: with real rates here no run could go on with another rate.
        lr=0.0,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    exempt = ParamWithNamePredicate(
        name="no_weight_decay", fn=lambda param, name: has_no_weight_decay(param, name, optim.no_weight_decay)
    )
    optimizer = get_megatron_optimizer(
        mcore_config,
        list(model_chunks),
        config_overrides={ParamKey(with_name_predicate=exempt): {"wd_mult": 0.0}},
        use_gloo_process_groups=use_gloo_process_groups,
    )
    set_hyperparameters(optimizer, optim)
    return optimizer


def has_no_weight_decay(param: torch.Tensor, name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter is exempt: norms, biases and scalars (at most one dimension), or a pattern of the config.

    Args:
        param: the parameter, in its model shape.
        name: its name in the model chunk; the leading `module.` of wrappers is left out before matching.
        patterns: `optim.no_weight_decay`, in the syntax of fnmatch: `*word_embeddings*`.
    """
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return param.dim() <= 1 or name.endswith(".bias") or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def set_hyperparameters(optimizer: Any, optim: OptimConfig) -> None:
    """Write betas, epsilon and weight decay into all parameter groups.

    Call it again after a checkpoint was loaded: the groups come with the values of the run that saved them. It is also
    what applies a group's `wd_mult`; in Megatron-LM that is the scheduler's work.
    """
    for group in optimizer.param_groups:
        group["betas"] = (optim.adam_beta1, optim.adam_beta2)
        group["eps"] = optim.adam_eps
        group["weight_decay"] = optim.weight_decay * group.get("wd_mult", 1.0)
