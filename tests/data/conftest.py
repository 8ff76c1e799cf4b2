"""A tiny corpus, its tokenizer and its prepared data, made once for the tests of ling.data."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ling.config.schema import Config
from ling.data.prepare import prepare
from ling.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

VOCAB_SIZE = 320
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


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 5 to 60 words, with several spaces, tabs and line ends among them."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        words = [
            draw.choice(WORDS) + draw.choice([" ", " ", " ", "  ", "\n", ".\t"]) for _ in range(draw.randint(5, 60))
        ]
        texts.append(f"Document {number}: " + "".join(words))
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One record per text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(300)


@pytest.fixture(scope="session")
def jsonl(folder, texts) -> Path:
    return write_jsonl(folder / "text.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer_dir(folder, jsonl) -> Path:
    train_sentencepiece([jsonl], VOCAB_SIZE, folder / "tokenizer")
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def prefix(folder, jsonl, tokenizer_dir) -> str:
    prepare([jsonl], tokenizer_dir, folder / "train")
    return str(folder / "train")


@pytest.fixture(scope="session")
def other_prefix(folder, tokenizer_dir) -> str:
    prepare([write_jsonl(folder / "other.jsonl", make_texts(70, seed=1))], tokenizer_dir, folder / "other")
    return str(folder / "other")


@pytest.fixture
def config(tokenizer_dir, prefix, other_prefix) -> Config:
    made = Config()
    made.model.vocab_size = VOCAB_SIZE
    made.data.train = [{"path": prefix, "weight": 3.0}, {"path": other_prefix, "weight": 1.0}]
    made.data.valid = {"held_out": other_prefix}
    made.data.tokenizer = str(tokenizer_dir)
    made.data.sequence_length = 32
    made.train.global_batch_size = 4
    made.train.train_iters = 10
    return made
