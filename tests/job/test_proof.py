"""The comparison behind `ling prove-resume` sees every kind of difference, and names the first."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from ling.checkpoint.folder import Manifest, record_of, step_folder, write_manifest
from ling.job.attempts import Attempt
from ling.job.proof import compare_exactly, compare_losses
from ling.observe.metrics import open_metrics

STEPS = 4


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    weights = {f"model.layer{i}.weight": torch.randn(5, 7, generator=draw) for i in range(3)}
    return weights | {"optimizer.exp_avg": torch.randn(9, generator=draw).bfloat16(), "scalar": torch.tensor(2.0)}


def make_run(folder: Path, losses=(4.0, 3.5, 3.25, 3.0), crc32="0badcafe", step=STEPS, samples=16, **changed) -> Path:
    """A run's folder with a checkpoint; `changed` are tensors in place of others."""
    Attempt.begin(folder, started=0.0, resumed_from=2, nodes=1, world_size=1).end({"reason": "done"}, step)
    metrics = open_metrics(folder, 0)
    for number, loss in enumerate(losses, start=1):
        metrics.write({"step": number, "loss": loss, "data_crc32": crc32, "step_ms": 1.0 + number, "lr": 1e-3})
    metrics.write({"step": len(losses), "eval": {"held": losses[-1]}})
    metrics.close()
    checkpoint = step_folder(folder, step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors() | changed, checkpoint_id=checkpoint, no_dist=True)
    manifest = Manifest(step, samples, {}, 1, {}, loss=losses[-1])
    manifest.files = {path.name: record_of(path) for path in checkpoint.iterdir()}
    write_manifest(checkpoint, manifest)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("proof") / "whole")


def test_equal_runs_are_proved(whole, tmp_path):
    verdict = compare_exactly(whole, make_run(tmp_path / "again"))
    assert verdict.is_proved
    assert verdict.compared == {"records": STEPS + 1, "tensors": 5}
    assert verdict.lines() == ["compared 5 records, 5 tensors"]


def flipped(name: str) -> dict[str, torch.Tensor]:
    """The tensor with the lowest bit of its last element flipped."""
    tensor = tensors()[name].clone()
    tensor.view(-1).view(torch.uint8)[-tensor.element_size()] ^= 1
    return {name: tensor}


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"losses": (4.0, 3.5, 3.2500000000000004, 3.0)}, "step 3: loss 3.2500000000000004, and 3.25 without a stop"),
        ({"losses": (4.0, 3.5, float("nan"), 3.0)}, "step 3: loss nan, and 3.25 without a stop"),
        ({"losses": (4.0, 3.5, 3.25)}, "step 3: step 3, and 4 without a stop"),
        ({"crc32": "0badcaff"}, "step 1: data_crc32 '0badcaff', and '0badcafe' without a stop"),
        ({"samples": 17}, "consumed_samples 17, and 16 without a stop"),
        ({"extra": torch.zeros(1)}, "the checkpoints hold other tensors: ['extra']"),
        (flipped("model.layer1.weight"), "model.layer1.weight (first at element [4, 6])"),
        (flipped("optimizer.exp_avg"), "optimizer.exp_avg (first at element [8])"),
        (flipped("scalar"), "scalar (first at element [])"),
        ({"scalar": torch.tensor(2.0, dtype=torch.float64)}, "scalar (first at element [])"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_first_difference_is_named(whole, tmp_path, changes, difference):
    verdict = compare_exactly(whole, make_run(tmp_path / "again", **changes))
    assert not verdict.is_proved
    if "losses" in changes and len(changes["losses"]) == 3:
        assert verdict.difference.startswith("record 4: ")
    else:
        assert verdict.difference == difference


def test_an_older_last_checkpoint_is_no_proof(whole, tmp_path):
    verdict = compare_exactly(whole, make_run(tmp_path / "again", step=3))
    assert "step_00000003, and " in verdict.difference


def test_losses_on_another_layout(whole, tmp_path):
    near = make_run(tmp_path / "near", losses=(4.0, 3.5, 3.25001, 3.0))
    verdict = compare_losses(whole, near, 1e-5)
    assert verdict.is_proved
    assert verdict.compared == {"losses": 2, "batches of data": STEPS}, "the losses after the stop, and all data"
    assert verdict.largest_deviation == pytest.approx(1e-5 / 3.25)
    far = make_run(tmp_path / "far", losses=(4.0, 3.5, 3.2501, 3.0))
    assert compare_losses(whole, far, 1e-5).difference == "step 3: loss 3.2501, and 3.25 without a stop"
    other = make_run(tmp_path / "other", crc32="0badcaff")
    assert compare_losses(whole, other, 1e-5).difference == "step 1: other data"
    short = make_run(tmp_path / "short", losses=(4.0, 3.5, 3.25))
    assert compare_losses(whole, short, 1e-5).difference == "the steps are [1, 2, 3], and [1, 2, 3, 4] without a stop"


def test_nothing_compared_is_no_proof(whole, tmp_path):
    nothing = make_run(tmp_path / "a", losses=(4.0, 3.5))
    assert not compare_losses(nothing, nothing, 1e-5).is_proved
