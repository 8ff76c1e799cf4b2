"""Runs that export while they train, with real exports: one rank through the front door, two ranks, and a failure."""

from pathlib import Path

import pytest
import torch

from ling.checkpoint.folder import checkpoints, newest, step_folder
from ling.cli import main
from ling.hf.export import export
from ling.observe.loggers import JsonlLogger, Loggers
from ling.observe.metrics import read_metrics
from tests.checkpoint.runs import EP, run_config
from tests.dist.training import build_trainer
from tests.e2e.cli import ling
from tests.hf.directories import MOE, make_tokenizer, read_all

OFTEN = ["checkpoint.save_interval=2", "checkpoint.export_every=2", "checkpoint.export_at_end=true"]
BESIDES = ["checkpoint.async_save=true", "checkpoint.keep_last=1", "train.eval_interval=0"]


def same_weights(one: Path, other: Path) -> bool:
    first, second = read_all(one), read_all(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_exports_in_the_middle_and_at_the_end(place):
    folder = place / "exporting"
    done = ling("train", "run.yaml", "run.dir=exporting", "train.train_iters=3", *OFTEN, *BESIDES, cwd=place)
    assert done.code == 0, done
    assert [path.name for path in sorted((folder / "exports").iterdir())] == ["step_00000002", "step_00000003"]
    assert [record["export"]["step"] for record in read_metrics(folder) if "export" in record] == [2, 3]
    assert done.out.count(" in the background, ") == 3, "the first save, and both exports"
    assert [step for step, _ in checkpoints(folder)] == [3], "2 has gone, but not before it was exported"
    export(step_folder(folder, 3), place / "by_hand")
    assert same_weights(place / "by_hand", folder / "exports" / "step_00000003")
    card = (folder / "exports" / "step_00000002" / "README.md").read_text()
    assert "256 tokens (2 steps, 8 sequences of 32)" in card


def train(config, run_dir: Path) -> str:
    """Train to the end, from the newest checkpoint if there is one; what was announced of exports."""
    trainer = build_trainer(config, run_dir)
    if (start := newest(run_dir)) is not None:
        trainer.load(start)
    if trainer.world.is_main:
        trainer.loggers = Loggers([JsonlLogger(run_dir, trainer.step)])
    said: list[str] = []
    trainer.checkpoints.exports._announce = said.append
    trainer.run()
    return "\n".join(said)


def config_of(layout: str, folder: Path, **checkpoint):
    make_tokenizer(folder / "tokenizer")
    return run_config(
        layout,
        folder,
        MOE,
        data={"tokenizer": str(folder / "tokenizer")},
        precision={"recipe": "bf16"},
        train={"train_iters": 3},
        checkpoint={"save_interval": 2, **checkpoint},
    )


def test_two_ranks(ranks, tmp_path):
    config = config_of("EP2", tmp_path, export_every=2, export_at_end=True)
    assert config.parallel.expert_model_parallel_size == EP["expert_model_parallel_size"]
    said, nothing = ranks.run(2, train, config, tmp_path / "run")
    assert nothing == ""
    assert "could not" not in said
    for step in (2, 3):
        export(step_folder(tmp_path / "run", step), tmp_path / str(step))
        assert same_weights(tmp_path / str(step), tmp_path / "run" / "exports" / f"step_{step:08d}")
    two, three = (read_all(tmp_path / str(step)) for step in (2, 3))
    assert any(not torch.equal(two[name], three[name]) for name in two)


def test_an_export_that_fails_does_not_end_the_run_and_is_made_by_the_next_start(ranks, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "exports").write_text("where a folder should be made")
    (said,) = ranks.run(1, train, config_of("single", tmp_path, export_every=2), run)
    assert said.startswith(f"warning: step 2 could not be exported: {run / 'exports'} cannot be made")
    assert said.endswith("training goes on")
    (error,) = [record["export"]["error"] for record in read_metrics(run) if "export" in record]
    assert "cannot be made" in error
    assert [step for step, _ in checkpoints(run)] == [2, 3]

    (run / "exports").unlink()
    (said,) = ranks.run(1, train, config_of("single", tmp_path, export_every=2), run)
    assert said.startswith(f"exported {run / 'exports' / 'step_00000002'} in the background, ")
    export(step_folder(run, 2), tmp_path / "by_hand")
    assert same_weights(tmp_path / "by_hand", run / "exports" / "step_00000002")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.mcore={softmax_scale: 0.5}", "checkpoint.export_every: model.mcore.softmax_scale: a Hugging Face"),
        ("checkpoint.export_every=3", "checkpoint.export_every: 3 is no multiple of checkpoint.save_interval (2)"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_run(place, monkeypatch, capsys, setting, message):
    monkeypatch.chdir(place)
    assert main(["train", "run.yaml", "run.dir=refused", *OFTEN, setting]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("refused").exists()
    assert main(["config", "check", "run.yaml", *OFTEN, setting]) == 2
    assert message in capsys.readouterr().err
