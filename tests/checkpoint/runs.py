"""What the tests of checkpoints run on the ranks of a world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ling.checkpoint.folder import step_folder
from ling.config import Config
from ling.config.schema import ModelConfig
from ling.trainer import Trainer
from tests.dist.training import MOE, Place, bare_chunks, batches_of, build_trainer, global_state, tiny_config

SWIGLU_MOE = replace(MOE, activation="swiglu")
"""With MTP; PowLU's kink at 0 would make a rounding difference a difference of the gradient."""

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
WHOLE = {"use_distributed_optimizer": False}
# name: ranks, sequences of a micro-batch (of 4 in a step), layout
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "single": (1, 4, {}),
    "single, whole optimizer": (1, 4, WHOLE),
    "DP2": (2, 2, {}),
    "DP2, whole optimizer": (2, 2, WHOLE),
    "TP2": (2, 4, TP),
    "PP2": (2, 1, PP),
    "VPP2": (2, 1, VPP),
    "EP2": (2, 2, EP),
    "EP2, whole optimizer": (2, 2, EP | WHOLE),
    "TP2xPP2": (4, 2, TP | PP),
    "VPP2xEP2": (4, 1, VPP | EP),
    "EP4": (4, 1, {"expert_model_parallel_size": 4}),
    "TP2xEP2": (4, 2, TP | EP),
}


def run_config(layout: str, folder: Path, model: ModelConfig = SWIGLU_MOE, **branches: dict[str, Any]) -> Config:
    """Config of a tiny run on a layout of the table, with a tokenizer to copy in `folder`."""
    size, micro_batch_size, parallel = LAYOUTS[layout]
    tokenizer = folder / "tokenizer.txt"
    tokenizer.write_text("a tokenizer")
    branches["data"] = {"tokenizer": str(tokenizer)} | branches.get("data", {})
    branches["train"] = {"micro_batch_size": micro_batch_size} | branches.get("train", {})
    return tiny_config(size, model, **{"parallel": parallel} | branches)


def steps(trainer: Trainer, count: int, key: str = "loss") -> list[float]:
    """Train so many steps."""
    batches = batches_of(trainer)
    return [trainer.train_step(batches)[key] for _ in range(count)]


def save_then_train(config: Config, run_dir: Path, before: int, after: int) -> list[float]:
    """Train, save, train on; the losses after the save."""
    trainer = build_trainer(config, run_dir)
    steps(trainer, before)
    trainer.save()
    return steps(trainer, after)


def load_then_train(config: Config, folders: list[Path], after: int) -> list[list[float]]:
    """The losses that follow each of these checkpoints."""
    losses = []
    for folder in folders:
        trainer = build_trainer(config)
        spoil(trainer)
        trainer.load(folder)
        losses.append(steps(trainer, after))
    return losses


def spoil(trainer: Trainer) -> None:
    """Change all that a checkpoint has to bring back."""
    with torch.no_grad():
        for chunk in bare_chunks(trainer):
            for tensor in [*chunk.parameters(), *chunk.buffers()]:
                if tensor.is_floating_point():
                    tensor.add_(1.0)


def weights_of(trainer: Trainer) -> tuple[Place, dict[str, torch.Tensor]]:
    """This rank's weights and router biases by global name."""
    found: dict[str, torch.Tensor] = {}
    for chunk in bare_chunks(trainer):
        weights, biases = global_state(chunk)
        found |= weights | biases
    return Place.here(), found


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """Where `save_then_train` has put its checkpoint."""
    return step_folder(run_dir, step)
