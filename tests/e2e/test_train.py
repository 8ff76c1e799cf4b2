"""`ling train` from the outside: what a run prints and leaves behind, how it goes on, and when it refuses to."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from ling.checkpoint.folder import newest, read_manifest
from ling.config import load_config
from ling.observe.metrics import read_metrics
from tests.e2e.cli import complete, kill, ling, start

STEP_FIELDS = {
    "step", "consumed_samples", "consumed_tokens", "loss", "mtp_loss", "grad_norm", "lr", "global_batch_size",
    "tokens_per_s", "tokens_per_s_per_device", "tflops_per_device", "mfu", "step_ms", "peak_memory_gib", "attempt",
    "data_crc32",
}  # fmt: skip


def steps_of(folder: Path) -> list[dict]:
    return [record for record in read_metrics(folder) if "eval" not in record]


def evaluations_of(folder: Path) -> list[dict]:
    return [record for record in read_metrics(folder) if "eval" in record]


def losses_of(folder: Path) -> list[float]:
    return [record["loss"] for record in steps_of(folder)]


def outcome_of(folder: Path) -> dict:
    return json.loads((folder / "job" / "outcome.json").read_text())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copy(finished, place, request) -> Path:
    """The finished run in a folder of this test's own, named as `run.dir` takes it: relative to `place`."""
    name = request.node.name
    shutil.copytree(finished[0], place / name)
    return Path(name)


def test_what_a_run_prints(finished):
    lines = finished[1].out.splitlines()
    assert lines[0] == "ling: tiny"
    assert any(line.split() == ["layout", "TP=1", "PP=1", "EP=1", "ETP=1", "DP=1"] for line in lines)
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == [f"{step}/6" for step in range(1, 7)]
    assert all(re.search(r"loss \d\.\d{4} \| mtp .* tok/s/device", line) for line in steps)
    assert len([line for line in lines if line.startswith("eval at step ")]) == 2
    assert lines[-1] == f"saved {Path('finished', 'checkpoints', 'step_00000006')}"
    assert finished[1].err == ""


def test_metrics_have_a_line_per_step(finished):
    folder = finished[0]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "eval" not in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    for number, record in enumerate(steps, start=1):
        assert set(record) == STEP_FIELDS
        assert record["consumed_samples"] == 4 * number
        assert record["consumed_tokens"] == 4 * 32 * number
        assert record["global_batch_size"] == 4
        assert record["attempt"] == 1
        assert record["mfu"] is None  # the peak of a CPU is not known
        assert record["tokens_per_s"] == pytest.approx(4 * 32 / (record["step_ms"] / 1e3))
        assert re.fullmatch(r"[0-9a-f]{8}", record["data_crc32"])
        assert all(math.isfinite(record[key]) and record[key] > 0 for key in STEP_FIELDS - {"mfu", "data_crc32"})
    assert [record["lr"] for record in steps] == pytest.approx([5e-3, *[1e-2] * 5])
    evaluations = [record for record in records if "eval" in record]
    assert [record["step"] for record in evaluations] == [3, 6]
    assert all(set(record) == {"step", "eval", "attempt"} for record in evaluations)
    assert all(set(record["eval"]) == {"held_out"} for record in evaluations)
    assert steps[0]["loss"] == pytest.approx(math.log(300), rel=0.05)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert evaluations[-1]["eval"]["held_out"] == pytest.approx(steps[-1]["loss"], rel=0.15)


def test_a_run_leaves_config_checkpoint_and_outcome(finished):
    folder = finished[0]
    config = load_config(folder / "config.yaml")
    assert config.precision.recipe in ("fp32", "bf16"), "auto is resolved"
    assert config.model.hidden_size == 32
    assert config.run.dir == "finished"
    assert outcome_of(folder) == {"reason": "done", "step": 6}
    checkpoint = newest(folder)
    assert checkpoint == folder / "checkpoints" / "step_00000006"
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.consumed_samples, manifest.world_size) == (6, 24, 1)
    assert manifest.loss == losses_of(folder)[-1]
    assert manifest.config["precision"]["recipe"] == config.precision.recipe
    assert manifest.files
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoints", "job"}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000006"]


def test_a_finished_run_started_again_stays_as_it_is(place, copy):
    before = content(place / copy)
    done = ling("train", "run.yaml", f"run.dir={copy}", cwd=place)
    assert done.code == 0, done
    assert f"resumed from {copy}/checkpoints/step_00000006 at step 6" in done.out
    assert done.out.splitlines()[-1] == "ling: nothing was left to do at step 6; raise train.train_iters to go on"
    after = content(place / copy)
    assert before.pop("config.yaml") != after.pop("config.yaml")  # another run.dir
    assert after == before


def test_more_steps_continue_the_run(place, copy):
    before = (place / copy / "metrics.jsonl").read_text()
    done = ling("train", "run.yaml", f"run.dir={copy}", "train.train_iters=9", cwd=place)
    assert done.code == 0, done
    assert "resumed from" in done.out
    assert (place / copy / "metrics.jsonl").read_text().startswith(before)
    steps = steps_of(place / copy)
    assert [record["step"] for record in steps] == list(range(1, 10))
    assert [record["consumed_samples"] for record in steps] == list(range(4, 40, 4))
    assert [record["attempt"] for record in steps] == [1] * 6 + [2] * 3
    assert [record["step"] for record in evaluations_of(place / copy)] == [3, 6, 9]
    assert max(losses_of(place / copy)[6:]) < losses_of(place / copy)[1], "it starts from the weights that it had"
    assert newest(place / copy).name == "step_00000009"
    assert outcome_of(place / copy) == {"reason": "done", "step": 9}
    assert load_config(place / copy / "config.yaml").train.train_iters == 9


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("run.seed=7", "run.seed=1234 (now 7)"),
        ("model.moe_router_topk=1", "model.moe_router_topk=2 (now 1)"),
        ("data.train=valid", "data.train=train (now valid)"),
        ("train.global_batch_size=8", "train.global_batch_size=4 (now 8)"),
    ],
    ids=["seed", "model", "data", "batch"],
)
def test_another_run_in_the_folder_is_refused(place, finished, override, difference):
    before = content(finished[0])
    done = ling("train", "run.yaml", "run.dir=finished", override, cwd=place)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("ling: error: finished belongs to a run with ")
    assert done.err.count("\n") == 1
    assert difference in done.err
    assert f"train.allow_change=[{override.split('=')[0]}]" in done.err
    assert content(finished[0]) == before


def test_changes_can_be_allowed(place, copy):
    changes = ["run.seed=7", "model.moe_router_topk=1", "train.allow_change=[run.seed,model]"]
    done = ling("train", "run.yaml", f"run.dir={copy}", *changes, "train.train_iters=8", cwd=place)
    assert done.code == 0, done
    assert [record["step"] for record in steps_of(place / copy)] == list(range(1, 9))
    assert load_config(place / copy / "config.yaml").run.seed == 7


def test_a_killed_run_goes_on(place, finished):
    overrides = ["run.dir=killed", "checkpoint.save_interval=2", "train.eval_interval=0"]
    process = start("train", "run.yaml", *overrides, "train.train_iters=100000", cwd=place)
    saved = any(line.startswith("saved killed/checkpoints/step_00000004") for line in process.stdout)
    more = any(line.startswith("step ") for line in process.stdout)
    kill(process)
    assert saved
    assert more
    assert not (place / "killed" / "job" / "outcome.json").exists()
    last = int(newest(place / "killed").name[-8:])
    assert steps_of(place / "killed")[-1]["step"] > last or last > 4

    done = ling("train", "run.yaml", *overrides, f"train.train_iters={last + 3}", cwd=place)
    assert done.code == 0, done
    assert f"at step {last}\n" in done.out
    steps = steps_of(place / "killed")
    assert [record["step"] for record in steps] == list(range(1, last + 4))
    assert [record["attempt"] for record in steps] == [1] * last + [2] * 3
    # as if nothing had happened: steps 5 and 6 are those of the run that was not interrupted
    assert losses_of(place / "killed")[:6] == pytest.approx(losses_of(finished[0]), rel=1e-3)
    assert not list((place / "killed" / "checkpoints").glob(".*")), "nothing half-written is left"
    assert outcome_of(place / "killed") == {"reason": "done", "step": last + 3}


def test_two_ranks_with_expert_parallelism(place, finished):
    overrides = ["run.dir=two", "parallel.expert_model_parallel_size=2"]
    done = complete(start("train", "run.yaml", "--nproc", "2", *overrides, cwd=place))
    assert done.code == 0, done
    assert any(line.split() == ["layout", "TP=1", "PP=1", "EP=2", "ETP=1", "DP=2"] for line in done.out.splitlines())
    assert len(re.findall("^step ", done.out, re.MULTILINE)) == 6, "only one rank speaks"
    assert [record["step"] for record in steps_of(place / "two")] == [1, 2, 3, 4, 5, 6]
    assert losses_of(place / "two") == pytest.approx(losses_of(finished[0]), rel=2e-2)
    assert read_manifest(newest(place / "two")).world_size == 2
    assert outcome_of(place / "two") == {"reason": "done", "step": 6}


def test_a_loss_that_is_not_finite_stops_the_run(place):
    overrides = ["run.dir=diverged", "optim.lr=1e38", "optim.lr_warmup_iters=0", "train.eval_interval=0"]
    done = ling("train", "run.yaml", *overrides, cwd=place)
    assert done.code == 1
    assert re.match(r"ling: error: step \d: loss .*, gradient norm .*; first in the gradient of rank 0: \w+", done.err)
    assert done.err.endswith("the last good checkpoint is none\n")
    assert done.err.count("\n") == 1
    assert outcome_of(place / "diverged")["reason"] == "non-finite"
    assert newest(place / "diverged") is None
    assert [record["step"] for record in steps_of(place / "diverged")] == [1]
