"""`ling train` before and around its ranks: whose folder it is, what torchrun is given, which code comes out."""

import json
import sys

import pytest

from ling.cli import main
from ling.commands import train
from ling.config import Config, UserError, load_config


@pytest.fixture
def config(tmp_path) -> Config:
    made = Config()
    made.model.num_layers, made.model.hidden_size, made.model.num_attention_heads = 2, 32, 2
    made.model.ffn_hidden_size, made.model.vocab_size = 48, 300
    made.data.train, made.data.tokenizer, made.data.sequence_length = "train", "tokenizer", 32
    made.model.activation = {"name": "powlu"}
    made.optim.lr = 1e-3
    made.train.train_iters, made.train.global_batch_size = 6, 4
    made.run.dir = str(tmp_path / "run")
    return made


def test_a_new_folder_gets_the_config(config, tmp_path):
    train._claim_folder(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_the_same_run_may_start_again(config, tmp_path):
    train._claim_folder(config)
    train._claim_folder(config)
    config.train.train_iters, config.train.micro_batch_size, config.parallel.tensor_model_parallel_size = 9, 2, 2
    config.checkpoint.save_interval, config.observe.log_interval, config.data.num_workers = 3, 5, 1
    train._claim_folder(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config, "the newest start's config is kept"


def test_a_start_that_was_killed_leaves_no_foreign_folder(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.partial").write_text("run: {na")
    train._claim_folder(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config


def test_an_outcome_of_the_attempt_before_is_removed(config, tmp_path):
    train._claim_folder(config)
    train._write_outcome(tmp_path / "run", {"reason": "done", "step": 6})
    assert json.loads((tmp_path / "run" / "job" / "outcome.json").read_text())["step"] == 6
    train._claim_folder(config)
    assert list((tmp_path / "run" / "job").iterdir()) == []


def test_every_difference_is_shown(config):
    train._claim_folder(config)
    config.run.seed, config.model.activation = 7, {"name": "swiglu"}
    with pytest.raises(UserError) as raised:
        train._claim_folder(config)
    assert 'run.seed=1234 (now 7), model.activation={"name": "powlu"} (now {"name": "swiglu"}): ' in str(raised.value)
    assert str(raised.value).endswith("train.allow_change=[run.seed,model.activation]")


@pytest.mark.parametrize("allowed", [["run.seed", "optim.lr"], ["run", "optim"], ["run.seed", "optim"]], ids=str)
def test_changes_are_allowed_by_key_or_branch(config, allowed):
    train._claim_folder(config)
    config.run.seed, config.optim.lr = 7, 2e-3
    for too_little in ([], allowed[:1], allowed[1:]):
        config.train.allow_change = too_little
        with pytest.raises(UserError, match="belongs to a run with"):
            train._claim_folder(config)
    config.train.allow_change = allowed
    train._claim_folder(config)


@pytest.fixture
def started(config, monkeypatch):
    """Start 2 ranks with torchrun replaced; `started(code, outcome)` gives the exit code and torchrun's command."""
    folder = train.run_dir(config)

    def start(code: int, outcome: dict | None) -> tuple[int, list[str]]:
        commands = []

        def call(command, env):
            commands.append([*command, f"OMP_NUM_THREADS={env['OMP_NUM_THREADS']}"])
            if outcome is not None:
                train._write_outcome(folder, outcome)
            return code

        monkeypatch.setattr(train, "load_config", lambda path, overrides=(): config)
        monkeypatch.setattr(train, "_check", lambda config, world_size: None)
        monkeypatch.setattr(train.subprocess, "call", call)
        return main(["train", "run.yaml", "--nproc", "2", "optim.lr=1e-3"]), commands[0]

    return start


def test_torchrun_gets_the_arguments(started, monkeypatch):
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    _, command = started(0, {"reason": "done"})
    assert command[:5] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert command[5:] == ["-m", "ling", "train", "run.yaml", "optim.lr=1e-3", "OMP_NUM_THREADS=4"]


@pytest.mark.parametrize(
    ("code", "outcome", "expected"),
    [
        (0, {"reason": "done"}, 0),
        (0, {"reason": "stopped"}, 75),
        (0, None, 1),
        (1, {"reason": "non-finite"}, 1),
        (1, {"reason": "done"}, 1),
        (0, {"step": 3}, 1),
    ],
    ids=str,
)
def test_the_outcome_becomes_the_code(started, code, outcome, expected):
    assert started(code, outcome)[0] == expected


def test_ranks_of_torchrun_start_no_ranks(config, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "run.yaml", "--nproc", "2"]) == 2
    assert "--nproc: torchrun has started this process already" in capsys.readouterr().err
