"""Where a start begins: its own newest checkpoint, another run's, with another activation; what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ling.checkpoint.folder import newest, read_manifest
from ling.checkpoint.merge import merge
from ling.checkpoint.start import Start, check_start, find_start
from ling.config import Config, UserError, check_config
from ling.config.schema import ModelConfig
from ling.trainer import Trainer
from tests.checkpoint.files import make_run
from tests.checkpoint.runs import SWIGLU_MOE, run_config, steps, weights_of
from tests.dist.training import build_trainer

POWLU_MOE = replace(SWIGLU_MOE, activation="powlu")


def silent(text: str) -> None:
    pass


def trained(folder: Path, count: int = 2, **branches) -> Trainer:
    """A run that was trained so many steps and has a checkpoint."""
    (folder / "a").mkdir(exist_ok=True)
    trainer = build_trainer(run_config("single", folder, **branches), folder / "a")
    steps(trainer, count)
    trainer.save()
    return trainer


def branch_config(folder: Path, model: ModelConfig = SWIGLU_MOE, train=None, optim=None, **load) -> Config:
    """Config of a run that begins from the other's checkpoint."""
    load = {"load": str(folder / "a")} | load
    return run_config("single", folder, model, checkpoint=load, train=train or {}, optim=optim or {})


def begin(config: Config, run_dir: Path, said: list[str] | None = None) -> Trainer:
    """As a start of `ling train` does."""
    check_start(config, run_dir)
    trainer = build_trainer(config, run_dir)
    start = find_start(config, run_dir, silent if said is None else said.append)
    if start is not None:
        trainer.load(start.folder, start.is_own)
        assert trainer.step == start.step
    return trainer


@pytest.mark.ranks(1)
def test_a_branch_with_everything_goes_on_as_the_run_itself(tmp_path):
    original = trained(tmp_path)
    branch = begin(branch_config(tmp_path), tmp_path / "b")
    assert (branch.step, branch.consumed_samples) == (2, 8)
    assert branch.origin == {"checkpoint": str(tmp_path / "a" / "checkpoints" / "step_00000002"), "step": 2}
    assert steps(branch, 2) == steps(original, 2)


@pytest.mark.ranks(1)
def test_a_branch_into_a_decay(tmp_path):
    """The rate of the branch is its own schedule's, from the step that it branched at."""
    trained(tmp_path, 4)
    decay = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_wsd_decay_style": "linear"}
    branch = begin(branch_config(tmp_path, train={"train_iters": 8}, optim=decay), tmp_path / "b")
    assert steps(branch, 4, "lr") == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3, 0.0])


@pytest.mark.ranks(1)
def test_weights_alone_begin_at_step_0(tmp_path):
    original = trained(tmp_path)
    branch = begin(branch_config(tmp_path, load_optimizer=False, load_step=False), tmp_path / "b")
    assert (branch.step, branch.consumed_samples) == (0, 0)
    theirs = weights_of(original)[1]
    assert all(torch.equal(value, theirs[name]) for name, value in weights_of(branch)[1].items())
    assert branch.checkpoints._rank_state().optimizer_step == 0
    assert all(not part.tensor.any() for part in branch.checkpoints._rank_state().moment_parts())
    kept = begin(branch_config(tmp_path, load_step=False), tmp_path / "b")
    assert kept.step == 0
    assert kept.checkpoints._rank_state().optimizer_step == 2


@pytest.mark.ranks(1)
def test_another_activation_with_a_gentle_start(tmp_path):
    original = trained(tmp_path)
    said: list[str] = []
    train = {"recovery_steps": 2, "recovery_lr_factor": 0.25}
    config = branch_config(tmp_path, POWLU_MOE, train)
    branch = begin(config, tmp_path / "b", said)
    folder = newest(tmp_path / "a")
    assert said == [f"other than in {folder}: model.activation=powlu (it was swiglu)"]
    theirs = weights_of(original)[1]
    assert all(torch.equal(value, theirs[name]) for name, value in weights_of(branch)[1].items())
    rates = steps(branch, 1, "lr")
    branch.save()
    resumed = begin(config, tmp_path / "b")  # the recovery goes on where it was
    rates += steps(resumed, 2, "lr")
    assert rates == pytest.approx([0.25e-3, 0.25e-3, 1e-3])
    assert resumed.origin == branch.origin


@pytest.mark.ranks(1)
def test_a_run_with_checkpoints_of_its_own_resumes(tmp_path):
    trained(tmp_path)
    branch = begin(branch_config(tmp_path), tmp_path / "b")
    steps(branch, 1)
    own = branch.save()
    said: list[str] = []
    assert find_start(branch_config(tmp_path), tmp_path / "b", said.append) == Start(own, True, 3)
    assert said == [f"checkpoint.load={tmp_path / 'a'} is ignored: the run has checkpoints of its own"]


@pytest.mark.ranks(2)
def test_all_ranks_agree_on_what_is_damaged(tmp_path):
    from tests.dist.training import MOE

    config = run_config("DP2", tmp_path, MOE)
    trainer = build_trainer(config, tmp_path)
    folders = []
    for step in (1, 2):
        trainer.step = step
        folders.append(trainer.save())
    if trainer.world.rank == 0:
        path = folders[1] / "__1_0.distcp"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    said: list[str] = []
    assert find_start(config, tmp_path, said.append) == Start(folders[0], True, 1)
    assert len(said) == 1
    assert "__1_0.distcp has the checksum" in said[0]


@pytest.mark.ranks(2)
def test_what_one_rank_cannot_read_all_ranks_raise(tmp_path):
    trainer = build_trainer(run_config("DP2", tmp_path), tmp_path)
    folder = trainer.save()
    trainer.checkpoints._control.from_main(lambda: [path.write_bytes(b"") for path in folder.glob("__1_*")])
    if trainer.world.rank == 0:  # the other rank's share of the optimizer's state is in the files that are empty
        trainer.checkpoints._rank_state().moment_parts = list
        trainer.checkpoints._rank_state().model_parts = list
    with pytest.raises(UserError, match="is damaged: __1_0.distcp cannot be read"):
        trainer.load(folder)


@pytest.mark.ranks(1)
def test_a_merged_checkpoint_is_loaded_without_optimizer(tmp_path):
    trainer = trained(tmp_path)
    steps(trainer, 1)
    trainer.save()
    folders = [tmp_path / "a" / "checkpoints" / f"step_0000000{step}" for step in (2, 3)]
    merge(folders, [0.5, 0.5], tmp_path / "merged", lambda done, total: None)
    with pytest.raises(UserError, match=r"has no optimizer state; set checkpoint.load_optimizer=false"):
        begin(branch_config(tmp_path, load=str(tmp_path / "merged")), tmp_path / "b")
    config = branch_config(tmp_path, load=str(tmp_path / "merged"), load_optimizer=False)
    branch = begin(config, tmp_path / "b")
    assert branch.step == 3
    assert steps(branch, 1)[0] == pytest.approx(trainer.last_loss, rel=0.05)


CHANGED = {
    "other gatedness": ({"activation": "gelu"}, r"linear_fc1.weight has the shape \[192, 64\], here \[96, 64\]"),
    "other width": ({"ffn_hidden_size": 128}, r"linear_fc1.weight has the shape \[192, 64\], here \[256, 64\]"),
    "more layers": ({"num_layers": 5}, "decoder.layers.4.input_layernorm.weight is missing in it"),
    "no MTP": ({"mtp_num_layers": 0}, "mtp.layers.0.enorm.weight is not in this model"),
    "vocabulary": ({"vocab_size": 300}, r"word_embeddings.weight has the shape \[256, 64\], here \[320, 64\]"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_model_is_refused_before_anything_is_built(tmp_path, name):
    changes, message = CHANGED[name]
    make_run(tmp_path / "a", [2])
    with pytest.raises(UserError, match=message) as caught:
        check_start(branch_config(tmp_path, replace(SWIGLU_MOE, **changes)), tmp_path / "b")
    assert "does not fit this run's model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_to_load_must_be_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        check_start(branch_config(tmp_path), tmp_path / "b")
    make_run(tmp_path / "a", [2])
    check_start(branch_config(tmp_path), tmp_path / "b")


def test_a_damaged_one_to_load_is_an_error_and_stays_as_it_is(tmp_path):
    from tests.checkpoint.files import flip_a_byte

    (folder,) = make_run(tmp_path / "a", [2]).values()
    flip_a_byte(folder / "__0_0.distcp")
    with pytest.raises(UserError, match="is damaged: __0_0.distcp has the checksum .*; name another checkpoint"):
        find_start(branch_config(tmp_path), tmp_path / "b", silent)
    assert folder.is_dir()


def test_recovery_needs_a_checkpoint_to_load(tmp_path):
    config = run_config("single", tmp_path)
    config.train.recovery_steps = 5
    with pytest.raises(UserError, match="train.recovery_steps: has no meaning without checkpoint.load"):
        check_config(config, 1)


def test_the_manifest_remembers_where_the_run_began(tmp_path):
    from tests.checkpoint.files import make_checkpoint

    origin = {"checkpoint": "runs/a/checkpoints/step_00000002", "step": 2}
    folder = make_checkpoint(tmp_path / "x", {"w": torch.zeros(1)}, origin=origin)
    assert read_manifest(folder).origin == origin


LEARNING = {"name": "polynorm"}


def scalars_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights_of(trainer)[1].items() if "scalars" in name}


@pytest.mark.ranks(1)
@pytest.mark.parametrize("learn", ["per_layer", "global"])
def test_scalars_of_an_activation(tmp_path, learn):
    """They are kept with their moments; another activation begins with its own."""
    model = replace(SWIGLU_MOE, activation=LEARNING | {"learn": learn})
    (tmp_path / "a").mkdir()
    config = run_config("single", tmp_path, model)
    original = build_trainer(config, tmp_path / "a")
    steps(original, 2)
    original.save()
    expected = scalars_of(original)
    assert expected
    resumed = begin(config, tmp_path / "a")
    assert all(torch.equal(value, expected[name]) for name, value in scalars_of(resumed).items())
    assert steps(resumed, 2) == steps(original, 2)

    said: list[str] = []
    other = replace(SWIGLU_MOE, activation="gelu")  # un-gated as well
    branch = build_trainer(branch_config(tmp_path, other), tmp_path / "b")
    branch.checkpoints._announce = said.append
    check_start(branch.config, tmp_path / "b")
    branch.load(newest(tmp_path / "a"), is_own=False)
    back = build_trainer(branch_config(tmp_path, model, load=str(tmp_path / "b")), tmp_path / "c")
    fresh = scalars_of(back)
    branch.save()
    said.clear()
    back.checkpoints._announce = said.append
    back.load(newest(tmp_path / "b"), is_own=False)
    assert all(torch.equal(value, fresh[name]) for name, value in scalars_of(back).items())
    assert len(said) == 1
    assert all(name in said[0] for name in fresh)
