"""A checkpoint that any layout has saved is exported to the same bits, and any layout loads an import."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ling.checkpoint.folder import newest
from ling.checkpoint.torch_dist import Reader
from ling.cli import main
from ling.hf.export import Options, export
from ling.hf.importing import import_model
from tests.checkpoint.runs import LAYOUTS, run_config
from tests.dist.ranks import Ranks
from tests.dist.training import SyntheticStream, bare_chunks, batches_of, build_trainer, global_state
from tests.hf.directories import DENSE, MOE, make_checkpoint, make_tokenizer, read_all

# bf16 with fp32 master weights, split over the optimizers of several ranks
SWIGLU = replace(MOE, activation="swiglu")
NAMES = ["single", "TP2", "PP2", "EP2", "VPP2xEP2", "TP2xEP2"]


def save(config, run_dir: Path) -> None:
    trainer = build_trainer(config, run_dir)
    trainer.save()


def config_of(layout: str, folder: Path, model=MOE, **branches):
    make_tokenizer(folder / "tokenizer")
    tokenizer = {"tokenizer": str(folder / "tokenizer")}
    return run_config(layout, folder, model, **{"data": tokenizer, "precision": {"recipe": "bf16"}} | branches)


@pytest.fixture(scope="module")
def single(ranks: Ranks, tmp_path_factory):
    """Exports of a checkpoint that one rank has saved, in bf16 and from the master weights."""
    return saved_and_exported(ranks, tmp_path_factory.mktemp("single"), "single")


def saved_and_exported(ranks: Ranks, folder: Path, layout: str, model=MOE) -> list[dict[str, torch.Tensor]]:
    ranks.run(LAYOUTS[layout][0], save, config_of(layout, folder, model), folder / "run")
    found = []
    for dtype in ("bfloat16", "float32"):
        export(folder / "run", folder / dtype, Options(dtype=dtype, max_shard_bytes=60_000))
        found.append(read_all(folder / dtype))
    return found


@pytest.mark.parametrize("layout", [name for name in NAMES if name != "single"])
def test_the_same_bits(ranks: Ranks, tmp_path, single, layout):
    for wanted, found in zip(single, saved_and_exported(ranks, tmp_path, layout), strict=True):
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_dense_model(ranks: Ranks, tmp_path):
    one, other = (saved_and_exported(ranks, tmp_path / name, name, DENSE) for name in ("single", "TP2"))
    for wanted, found in zip(one, other, strict=True):
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def load_and_describe(config, folder: Path) -> dict[str, torch.Tensor]:
    """This rank's weights after it has loaded a checkpoint without optimizer state."""
    trainer = build_trainer(config)
    trainer.checkpoints.load(folder, moments=False)
    found: dict[str, torch.Tensor] = {}
    for chunk in bare_chunks(trainer):
        weights, biases = global_state(chunk)
        found |= weights | biases
    return found


class FewSamples(SyntheticStream):
    """Four samples over and over: learnt by heart in a few steps."""

    def sample(self, i: int) -> dict:
        return super().sample(i % 4)


def train_on(config, run_dir: Path, start: Path | None = None, steps: int = 1) -> list[float]:
    """Losses of steps from a checkpoint without optimizer state, and a save after them."""
    trainer = build_trainer(config, run_dir, train_stream=FewSamples(config.model.vocab_size))
    if start is not None:
        trainer.load(start, is_own=False)
    batches = batches_of(trainer)
    losses = [trainer.train_step(batches)["loss"] for _ in range(steps)]
    trainer.save()
    return losses


FROM_WEIGHTS = {"load": "x", "load_optimizer": False, "load_step": False}


@pytest.fixture(scope="module")
def trained(ranks: Ranks, tmp_path_factory):
    """An import of the export of a run that has learnt something, and the loss that training goes on from."""
    folder = tmp_path_factory.mktemp("trained")
    config = config_of("single", folder, SWIGLU, precision={"recipe": "fp32"}, optim={"lr": 1e-2})
    ((first, *_, last),) = ranks.run(1, train_on, config, folder / "run", steps=20)
    assert last < first - 0.5
    export(folder / "run", folder / "hf")
    assert main(["import", str(folder / "hf"), str(folder / "imported")]) == 0
    config = config_of("single", folder, SWIGLU, precision={"recipe": "fp32"}, checkpoint=FROM_WEIGHTS)
    ((loss,),) = ranks.run(1, train_on, config, folder / "on", newest(folder / "run"))
    assert loss < first - 0.5
    return folder / "imported", loss


@pytest.mark.parametrize("layout", ["EP2", "TP2", "PP2", "TP2xEP2"])
def test_training_goes_on_from_an_import(ranks: Ranks, tmp_path, trained, layout):
    imported, wanted = trained
    config = config_of(layout, tmp_path, SWIGLU, precision={"recipe": "fp32"}, checkpoint=FROM_WEIGHTS)
    losses = ranks.run(LAYOUTS[layout][0], train_on, config, tmp_path / "run", imported, steps=2)
    assert losses[0][0] == pytest.approx(wanted, abs=1e-5)
    assert all(one == losses[0] for one in losses)
    assert math.isfinite(losses[0][1])
    before, after = (Reader(folder) for folder in (imported, newest(tmp_path / "run")))
    assert not torch.equal(before.read("output_layer.weight"), after.read("output_layer.weight"))


@pytest.mark.parametrize("layout", ["EP2", "PP2"])
def test_any_layout_loads_an_import(ranks: Ranks, tmp_path, layout):
    checkpoint = make_checkpoint(tmp_path / "first", MOE, dtype=torch.bfloat16)
    export(checkpoint, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "second")
    answers = [
        ranks.run(LAYOUTS[layout][0], load_and_describe, config_of(layout, tmp_path), folder)
        for folder in (tmp_path / "first", tmp_path / "second")
    ]
    for first, second in zip(*answers, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
