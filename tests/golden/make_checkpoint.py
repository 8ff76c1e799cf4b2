"""Makes a checkpoint of the present format for `tests/checkpoint/test_golden.py`; run it when the format rises.

python -m tests.golden.make_checkpoint tests/golden/checkpoint_v2
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from ling.config import Config
from ling.config.schema import ModelConfig
from ling.parallel import groups
from ling.platform import get_platform
from tests.dist.training import batches_of, build_trainer, tiny_config

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=8,
    ffn_hidden_size=16,
    vocab_size=40,
    max_position_embeddings=16,
    make_vocab_size_divisible_by=8,
    activation="swiglu",
    num_moe_experts=4,
    first_k_dense_replace=0,
    moe_ffn_hidden_size=8,
    moe_shared_expert_intermediate_size=8,
    moe_router_topk=2,
    moe_router_num_groups=2,
    moe_router_group_topk=1,
    mtp_num_layers=0,
)
STEPS, LATER = 2, 2


def golden_config(recipe: str = "fp32") -> Config:
    """The run that the golden checkpoint is of."""
    data = {"tokenizer": "tokenizer.txt", "sequence_length": 16}
    return tiny_config(1, MODEL, data=data, precision={"recipe": recipe})


def main(target: Path) -> None:
    """Train, save, and note the losses that come next."""
    platform = get_platform("cpu")
    platform.start(local_rank=0, num_threads=1)
    groups.connect(platform, groups.World(0, 1, 0, 1))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("tokenizer.txt").write_text("a tokenizer\n")
        trainer = build_trainer(golden_config(), Path("run"))
        batches = batches_of(trainer)
        for _ in range(STEPS):
            trainer.train_step(batches)
        saved = trainer.save()
        losses = [trainer.train_step(batches)["loss"] for _ in range(LATER)]
        shutil.copytree(saved, target)
    target.with_suffix(".json").write_text(json.dumps({"losses": losses, "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
