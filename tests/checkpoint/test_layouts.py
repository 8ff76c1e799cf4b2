"""A checkpoint of any layout goes on with any other: the same next losses, in fp32, weights and optimizer alike."""

from pathlib import Path

import pytest
import torch

from ling.checkpoint.folder import read_manifest
from ling.checkpoint.torch_dist import Reader
from ling.config import Config
from tests.checkpoint.runs import LAYOUTS, checkpoint_of, load_then_train, run_config, save_then_train, spoil, steps
from tests.dist.ranks import Ranks
from tests.dist.training import build_trainer

BEFORE, AFTER = 2, 2
TOLERANCE = 1e-5
# target: sources whose checkpoints it loads; together all that can change between two layouts
PAIRS = {
    "single": ["EP2", "TP2xPP2"],
    "single, whole optimizer": ["EP2"],
    "DP2, whole optimizer": ["EP2"],
    "TP2": ["single", "EP2"],
    "VPP2": ["TP2xPP2"],
    "EP2": ["single", "TP2xPP2"],
    "EP2, whole optimizer": ["single"],
    "VPP2xEP2": ["single", "EP2"],
}


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory):
    """Checkpoint of a source, and the losses that its run had after it; each is trained once."""
    found: dict[str, tuple[Path, list[float]]] = {}

    def get(layout: str) -> tuple[Path, list[float]]:
        if layout not in found:
            run_dir = tmp_path_factory.mktemp("saved")
            config = run_config(layout, run_dir)
            losses = ranks.run(LAYOUTS[layout][0], save_then_train, config, run_dir, BEFORE, AFTER)
            found[layout] = (checkpoint_of(run_dir, BEFORE), losses[0])
        return found[layout]

    return get


def check_pairs(ranks: Ranks, saved, target: str, sources: list[str], folder: Path) -> None:
    config = run_config(target, folder)
    by_rank = ranks.run(LAYOUTS[target][0], load_then_train, config, [saved(source)[0] for source in sources], AFTER)
    for by_source in by_rank:
        for source, losses in zip(sources, by_source, strict=True):
            assert losses == pytest.approx(saved(source)[1], rel=TOLERANCE), f"{source} to {target}"


@pytest.mark.parametrize("target", PAIRS)
def test_a_run_goes_on_on_another_layout(ranks: Ranks, saved, target, tmp_path):
    check_pairs(ranks, saved, target, PAIRS[target], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_loads_every_other(ranks: Ranks, saved, target, tmp_path):
    for source in LAYOUTS:
        if source != target:
            check_pairs(ranks, saved, target, [source], tmp_path)


def load_without_moments(config: Config, folder: Path) -> list[float]:
    trainer = build_trainer(config)
    trainer.checkpoints.load(folder, moments=False)
    trainer.consumed_samples = read_manifest(folder).consumed_samples
    return steps(trainer, AFTER)


def test_the_losses_would_show_a_lost_moment(ranks: Ranks, saved, tmp_path):
    """Without the optimizer's state the losses are others, so the comparison sees it."""
    folder, expected = saved("EP2")
    (losses,) = ranks.run(1, load_without_moments, run_config("single", tmp_path), folder)
    assert losses[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert abs(losses[-1] - expected[-1]) > 100 * TOLERANCE * expected[-1]


def save_again(config: Config, folder: Path, run_dir: Path) -> Path:
    trainer = build_trainer(config, run_dir)
    spoil(trainer)
    trainer.load(folder)
    return trainer.save()


@pytest.mark.parametrize("target", ["single, whole optimizer", "TP2", "VPP2xEP2"])
def test_every_bit_survives_another_layout(ranks: Ranks, bf16, target, tmp_path):
    """Saved by one layout, loaded and saved again by another: the same tensors, masters and moments among them."""
    config = run_config(target, tmp_path, precision={"recipe": "bf16"})
    again = ranks.run(LAYOUTS[target][0], save_again, config, bf16, tmp_path)[0]
    first, second = Reader(bf16), Reader(again)
    assert set(first.tensors) == set(second.tensors)
    kinds = {key.split(".")[2] for key in first.tensors if key.startswith("optimizer.state.")}
    assert kinds == {"param", "exp_avg", "exp_avg_sq"}
    for key in first.tensors:
        assert torch.equal(first.read(key), second.read(key)), key
    assert read_manifest(again).optimizer_step == read_manifest(bf16).optimizer_step == BEFORE


@pytest.fixture(scope="module")
def bf16(ranks: Ranks, tmp_path_factory) -> Path:
    """A checkpoint of EP 2 in bf16."""
    run_dir = tmp_path_factory.mktemp("bf16")
    config = run_config("EP2", run_dir, precision={"recipe": "bf16"})
    ranks.run(2, save_then_train, config, run_dir, BEFORE, 0)
    return checkpoint_of(run_dir, BEFORE)
