"""`ling train` before and around its ranks: whose folder it is, what torchrun is given, which code comes out."""

import pytest

from ling.cli import main
from ling.commands import train
from ling.config import Config, UserError, load_config
from ling.job import lease, local_ranks
from ling.job.lease import holder
from ling.job.local_ranks import Ended
from ling.job.outcome import Failure, read_outcome, write_failure, write_outcome


def claim(config: Config) -> None:
    """Claim the run's folder, and give it free again."""
    train._claim_folder(config).release()


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
    claim(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "job"}
    assert list((tmp_path / "run" / "job").iterdir()) == []


def test_the_same_run_may_start_again(config, tmp_path):
    claim(config)
    claim(config)
    config.train.train_iters, config.train.micro_batch_size, config.parallel.tensor_model_parallel_size = 9, 2, 2
    config.checkpoint.save_interval, config.observe.log_interval, config.data.num_workers = 3, 5, 1
    claim(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config, "the newest start's config is kept"


def test_a_start_that_was_killed_leaves_no_foreign_folder(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.partial").write_text("run: {na")
    claim(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config


def test_a_start_that_was_killed_before_its_config_was_written_leaves_none_either(config, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_AFTER_S", 0.2)
    (tmp_path / "run" / "job").mkdir(parents=True)
    (tmp_path / "run" / "job" / "lease_1.json").write_text("{}")
    claim(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config


def test_an_outcome_of_the_attempt_before_is_removed(config, tmp_path):
    claim(config)
    write_outcome(tmp_path / "run", {"reason": "done", "step": 6})
    claim(config)
    assert list((tmp_path / "run" / "job").iterdir()) == []


def test_a_folder_in_use_is_left_as_it_is(config, tmp_path):
    lease = train._claim_folder(config)
    write_outcome(tmp_path / "run", {"reason": "done", "step": 6})
    config.train.train_iters = 9
    with pytest.raises(UserError, match="run is in use by process"):
        train._claim_folder(config)
    assert load_config(tmp_path / "run" / "config.yaml").train.train_iters == 6
    assert read_outcome(tmp_path / "run") == {"reason": "done", "step": 6}
    lease.release()


def test_every_difference_is_shown(config):
    claim(config)
    config.run.seed, config.model.activation = 7, {"name": "swiglu"}
    with pytest.raises(UserError) as raised:
        claim(config)
    assert 'run.seed=1234 (now 7), model.activation={"name": "powlu"} (now {"name": "swiglu"}): ' in str(raised.value)
    assert str(raised.value).endswith("train.allow_change=[run.seed,model.activation]")


def test_another_ramp_of_the_batch_is_another_run(config):
    claim(config)
    config.train.rampup_batch_size = [1, 1, 100]
    with pytest.raises(UserError, match=r"train.rampup_batch_size=null \(now \[1, 1, 100\]\)"):
        claim(config)
    config.train.allow_change = ["train.rampup_batch_size"]
    claim(config)
    config.train.rampup_batch_size, config.train.allow_change = [1, 1, 99], []
    with pytest.raises(UserError, match=r"train.allow_change=\[train.rampup_batch_size\]"):
        claim(config)


@pytest.mark.parametrize("allowed", [["run.seed", "optim.lr"], ["run", "optim"], ["run.seed", "optim"]], ids=str)
def test_changes_are_allowed_by_key_or_branch(config, allowed):
    claim(config)
    config.run.seed, config.optim.lr = 7, 2e-3
    for too_little in ([], allowed[:1], allowed[1:]):
        config.train.allow_change = too_little
        with pytest.raises(UserError, match="belongs to a run with"):
            claim(config)
    config.train.allow_change = allowed
    claim(config)


@pytest.fixture
def started(config, monkeypatch):
    """Start 2 ranks that are not there: `started(ended, outcome)` gives the exit code and the ranks' arguments."""
    folder = train.run_dir(config)

    def start(ended: Ended, outcome: dict | None) -> tuple[int, list]:
        calls = []

        def run_local_ranks(*args):
            calls.append(args)
            assert holder(folder) is not None, "the folder is held for the ranks"
            if outcome is not None:
                write_outcome(folder, outcome)
            return ended

        monkeypatch.setattr(train, "load_config", lambda path, overrides=(): config)
        monkeypatch.setattr(train, "_check", lambda config, world_size: None)
        monkeypatch.setattr(local_ranks, "run_local_ranks", run_local_ranks)
        code = main(["train", "run.yaml", "--nproc", "2", "optim.lr=1e-3"])
        assert holder(folder) is None
        return code, calls[0]

    return start


def test_the_ranks_get_the_arguments(started):
    assert started(Ended(), {"reason": "done"})[1] == (2, ["train", "run.yaml", "optim.lr=1e-3"])


KILLED = Ended(Failure(1, "n1", None, "the process was killed by SIGKILL"))


@pytest.mark.parametrize(
    ("ended", "outcome", "expected"),
    [
        (Ended(), {"reason": "done"}, 0),
        (Ended(), {"reason": "stopped"}, 75),
        (Ended(signals=["SIGTERM"]), {"reason": "stopped"}, 75),
        (Ended(), None, 1),
        (KILLED, {"reason": "non-finite"}, 1),
        (KILLED, {"reason": "done", "step": 3}, 1),
        (KILLED, None, 1),
        (Ended(), {"step": 3}, 1),
        (Ended(KILLED.failure, ["SIGINT", "SIGINT"]), None, 130),
    ],
    ids=str,
)
def test_the_outcome_becomes_the_code(started, ended, outcome, expected):
    assert started(ended, outcome)[0] == expected


def test_the_last_line_names_the_rank_and_says_how_to_go_on(started, config, capsys):
    started(KILLED, None)
    expected = "rank 1 (n1) failed: the process was killed by SIGKILL"
    assert capsys.readouterr().err == f"ling: error: {expected}; there is no checkpoint yet\n"
    assert read_outcome(train.run_dir(config))["rank"] == 1


def test_what_a_rank_has_said_counts_more_than_its_code(started, config, capsys):
    folder = train.run_dir(config)
    monkeyed = Failure(1, "n1", 4, "ValueError: boom")
    write_failure(folder, monkeyed)
    outcome = read_outcome(folder)
    (folder / "job" / "outcome.json").unlink()
    started(Ended(local_ranks.killed(1, "n1", None, 1)), outcome)
    assert "rank 1 (n1) failed at step 4: ValueError: boom; " in capsys.readouterr().err


def test_ranks_of_torchrun_start_no_ranks(config, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "run.yaml", "--nproc", "2"]) == 2
    assert "--nproc: torchrun has started this process already" in capsys.readouterr().err
