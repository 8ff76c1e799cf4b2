"""A run branched from another, with added data and another activation; what happens to it when files are damaged."""

import json
from pathlib import Path

from ling.checkpoint.folder import read_manifest
from ling.observe.metrics import read_metrics
from tests.checkpoint.files import flip_a_byte
from tests.e2e.cli import Done, ling

BRANCH = ["train", "run.yaml", "run.dir=branch", "checkpoint.load=finished", "model.activation=swiglu"]
CHANGES = ["data.train=[train,valid]", "train.recovery_steps=1", "train.eval_interval=0", "checkpoint.save_interval=1"]
CHANGES += ["checkpoint.async_save=true", "checkpoint.keep_last=2"]


def train(place: Path, steps: int, *more: str) -> Done:
    done = ling(*BRANCH, *CHANGES, f"train.train_iters={steps}", *more, cwd=place)
    assert done.code == 0, done
    return done


def test_the_life_of_a_branch(place, finished):
    refused = ling(*BRANCH[:-1], "model.activation=gelu", cwd=place)
    assert refused.code == 2, refused
    assert (
        "step_00000006 does not fit this run's model: decoder.layers.0.mlp.linear_fc1.weight has the shape"
        in refused.err
    )
    assert not (place / "branch" / "config.yaml").exists()

    out = train(place, 9).out
    assert 'step_00000006: model.activation={"name": "swiglu"} (it was {"name": "powlu"})' in out
    assert "data.train=" in out
    assert "began from finished/checkpoints/step_00000006 with its optimizer, at step 6" in out
    records = [record for record in read_metrics(place / "branch") if "loss" in record]
    assert [record["step"] for record in records] == [7, 8, 9]
    assert [record["lr"] for record in records] == [1e-3, 1e-2, 1e-2]
    assert [record["consumed_samples"] for record in records] == [28, 32, 36]
    folders = sorted(path.name for path in (place / "branch" / "checkpoints").iterdir())
    assert folders == ["step_00000008", "step_00000009"]
    assert read_manifest(place / "branch" / "checkpoints" / "step_00000009", "always").origin["step"] == 6

    flip_a_byte(place / "branch" / "checkpoints" / "step_00000009" / "__0_0.distcp")
    out = train(place, 10).out
    assert "step_00000009 is damaged: __0_0.distcp has the checksum" in out
    assert "kept as step_00000009.damaged" in out
    assert "checkpoint.load=finished is ignored" in out
    assert "resumed from branch/checkpoints/step_00000008 at step 8" in out

    listed = ling("checkpoint", "list", "branch", "--json", cwd=place)
    assert [row["step"] for row in json.loads(listed.out)] == [9, 10]
    merged = ling(
        "checkpoint",
        "merge",
        *(f"branch/checkpoints/step_{step:08d}" for step in (9, 10)),
        "--output",
        "merged",
        cwd=place,
    )
    assert merged.code == 0, merged
    losses = {}
    for name in ("merged", "branch"):
        done = ling("eval", name, "--data", "valid", "--max-samples", "8", "--json", cwd=place)
        assert done.code == 0, done
        losses[name] = json.loads(done.out)["results"]["valid"]["loss"]
    assert 0 < abs(losses["merged"] - losses["branch"]) < 0.2


def test_a_run_without_a_good_checkpoint_does_not_begin_anew(place, finished):
    import shutil

    shutil.copytree(finished[0], place / "lost")
    (place / "lost" / "checkpoints" / "step_00000006" / ".metadata").unlink()
    done = ling("train", "run.yaml", "run.dir=lost", cwd=place)
    assert done.code == 2, done
    assert "lost has no good checkpoint left, only step_00000006.damaged" in done.err
    assert len(read_metrics(place / "lost")) == len(read_metrics(place / "finished"))
