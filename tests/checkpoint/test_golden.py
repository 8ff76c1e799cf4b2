"""Checkpoints of every format that was ever written still load, and train on as they did."""

import json
from pathlib import Path

import pytest

from ling.checkpoint.folder import FORMAT, read_manifest
from ling.config.load import from_dict
from tests.checkpoint.runs import spoil, steps
from tests.dist.training import build_trainer
from tests.golden.make_checkpoint import LATER, STEPS, golden_config

GOLDEN = Path(__file__).parents[1] / "golden"


def test_there_is_one_of_the_present_format():
    assert read_manifest(GOLDEN / f"checkpoint_v{FORMAT}", "always").format == FORMAT
    for folder in GOLDEN.glob("checkpoint_v*/"):
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 300_000


@pytest.mark.ranks(1)
@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_it_loads_and_trains_on(number):
    folder = GOLDEN / f"checkpoint_v{number}"
    manifest = read_manifest(folder, "always")
    assert (manifest.format, manifest.step, manifest.optimizer_step) == (number, STEPS, STEPS)
    from_dict(manifest.config, str(folder))  # its config is one that this schema knows
    trainer = build_trainer(golden_config())
    spoil(trainer)
    trainer.load(folder)
    expected = json.loads(folder.with_suffix(".json").read_text())["losses"]
    assert steps(trainer, LATER) == pytest.approx(expected, rel=1e-5)
