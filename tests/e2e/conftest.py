"""A tiny corpus taken through the front door: tokenizer, prepared data, a config, and one finished run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.e2e.cli import Done, complete, ling, start

VOCAB_SIZE = 300
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "seven",
    "ships",
    "sail",
    "in",
    "1623",
    "or",
    "42",
]
CONFIG = f"""
run: {{name: tiny}}
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 2
  num_query_groups: 1
  kv_channels: 16
  ffn_hidden_size: 48
  vocab_size: {VOCAB_SIZE}
  max_position_embeddings: 64
  num_moe_experts: 4
  first_k_dense_replace: 1
  moe_ffn_hidden_size: 16
  moe_shared_expert_intermediate_size: 16
  moe_router_topk: 2
  mtp_num_layers: 1
data: {{train: train, valid: {{held_out: valid}}, tokenizer: tokenizer, sequence_length: 32}}
optim: {{lr: 1e-2, lr_decay_style: constant, lr_warmup_iters: 2}}
precision: {{recipe: auto}}
train: {{train_iters: 6, micro_batch_size: 2, global_batch_size: 4, eval_interval: 3, eval_iters: 2}}
runtime: {{platform: cpu, num_threads: 1}}
"""


def write_corpus(path: Path, documents: int, seed: int) -> None:
    """Documents of 5 to 60 words, separated by blank lines."""
    draw = random.Random(seed)
    texts = (" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(documents))
    path.write_text("\n\n".join(texts))


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with run.yaml, tokenizer/, train.{bin,idx,json} and valid.{bin,idx,json}."""
    folder = tmp_path_factory.mktemp("e2e")
    (folder / "run.yaml").write_text(CONFIG)
    write_corpus(folder / "train.txt", 200, seed=0)
    write_corpus(folder / "valid.txt", 40, seed=1)
    commands = [
        ["tokenizer", "train", "--input", "train.txt", "--vocab-size", str(VOCAB_SIZE), "--output", "tokenizer"]
    ]
    for name in ("train", "valid"):
        files = ["--input", f"{name}.txt", "--output", name]
        commands.append(["data", "prepare", *files, "--tokenizer", "tokenizer", "--document-separator", ""])
    for command in commands:
        done = ling(*command, cwd=folder)
        assert done.code == 0, done
    return folder


@pytest.fixture(scope="session")
def finished(place) -> tuple[Path, Done]:
    """The folder of a run of 6 steps on one rank, as it ended; not to be written to. And what it printed."""
    done = complete(start("train", "run.yaml", "run.dir=finished", cwd=place))
    assert done.code == 0, done
    return place / "finished", done
