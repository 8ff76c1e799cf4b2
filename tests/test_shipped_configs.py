"""Every shipped YAML goes through the real CLI."""

from pathlib import Path

import pytest

from ling.cli import main
from ling.config import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
TRAINING = """
data: {train: data/train, tokenizer: data/tokenizer, sequence_length: 256}
optim: {lr: 2e-3}
train: {train_iters: 10, global_batch_size: 8}
"""
RUNS = sorted((CONFIGS / "runs").glob("*.yaml"))
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_can_start(path, capsys):
    assert main(["config", "check", str(path)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_is_a_base(path, tmp_path, capsys):
    run = tmp_path / "run.yaml"
    run.write_text(f"base: {path}\n{TRAINING}")
    assert main(["config", "check", str(run)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_is_named_like_its_file(path):
    assert load_config(path).run.name == path.stem


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_first_line_says_what_it_is(path):
    assert path.read_text().startswith("# ")
