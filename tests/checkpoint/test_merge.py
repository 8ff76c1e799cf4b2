"""Merged checkpoints, and that their weights stand for a learning-rate decay."""

import numpy as np
import pytest
import torch

from ling.checkpoint.folder import read_manifest, step_folder
from ling.checkpoint.merge import FACTORS, SCHEDULES, merge, weights_of_schedule
from ling.checkpoint.torch_dist import Reader
from ling.config import UserError
from tests.checkpoint.files import flip_a_byte, make_checkpoint


def silent(done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.mark.parametrize("schedule", FACTORS)
@pytest.mark.parametrize("steps", [[0, 10, 20, 30, 40], [100, 200], [5, 6, 8, 12, 20, 36]], ids=str)
def test_a_merge_stands_for_a_decay_of_sgd(schedule, steps):
    """Updates of SGD on a linear loss do not depend on the weights, so a decayed run can be simulated exactly."""
    random = np.random.default_rng(0)
    gradients = random.normal(size=(steps[-1] + 1, 6))  # of update i, counted from 1
    constant = np.cumsum(-0.1 * gradients, axis=0)  # weights after each update at the constant rate
    weights = weights_of_schedule(steps, schedule)
    merged = sum(weight * constant[step] for weight, step in zip(weights, steps, strict=True))

    length = (steps[-1] - steps[0]) * len(steps) / (len(steps) - 1)
    decayed = constant[steps[0]].copy()
    for earlier, later in zip(steps, steps[1:], strict=False):
        factor = FACTORS[schedule]((later - steps[0]) / length)  # the rate's factor for the updates up to this one
        for update in range(earlier + 1, later + 1):
            decayed -= 0.1 * factor * gradients[update]
    np.testing.assert_allclose(merged, decayed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_weights_are_an_average(schedule):
    for steps in ([1, 2], [10, 20, 30, 40], [3, 4, 9]):
        weights = weights_of_schedule(steps, schedule)
        assert sum(weights) == pytest.approx(1.0, rel=1e-12)
        assert min(weights) >= 0


def test_schedules_by_hand():
    assert weights_of_schedule([10, 20, 30, 40], "linear") == pytest.approx([0.25] * 4)
    assert weights_of_schedule([10, 20, 40], "mean") == pytest.approx([1 / 3] * 3)
    assert weights_of_schedule([10, 20], "cosine") == pytest.approx([0.5, 0.5])
    assert weights_of_schedule([0, 1, 2, 3], "1-sqrt") == pytest.approx(
        [0.5, 0.5**0.5 - 0.5, 0.75**0.5 - 0.5**0.5, 1 - 0.75**0.5]
    )


@pytest.mark.parametrize("steps", [[1], [], [2, 2], [3, 1]])
def test_a_schedule_needs_ascending_steps(steps):
    with pytest.raises(UserError, match="two checkpoints or more, of different steps"):
        weights_of_schedule(steps, "linear")


def states(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        master = torch.randn(6, 5, generator=generator)
        found.append(
            {
                "a": master.to(torch.bfloat16),
                "optimizer.state.param.a": master,
                "optimizer.state.exp_avg.a": master * 2,
                "b": torch.randn(7, generator=generator),
                "c": torch.randn(3, 2, generator=generator).to(torch.bfloat16),
            }
        )
    return found


def test_merge_averages_the_most_exact_weights(tmp_path):
    tensors, weights = states(3), [0.5, 0.125, 0.375]
    folders = [make_checkpoint(step_folder(tmp_path, step), each, step) for step, each in enumerate(tensors, 1)]
    merge(folders, weights, tmp_path / "merged", silent)
    reader = Reader(tmp_path / "merged")
    assert set(reader.tensors) == {"a", "b", "c"}
    for key, source in (("a", "optimizer.state.param.a"), ("b", "b"), ("c", "c")):
        expected = sum(weight * each[source].double() for weight, each in zip(weights, tensors, strict=True))
        found = reader.read(key)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-7, atol=1e-7)
    manifest = read_manifest(tmp_path / "merged", "always")
    assert (manifest.step, manifest.consumed_samples, manifest.optimizer_step) == (3, 12, None)
    assert [(each["step"], each["weight"]) for each in manifest.merged] == [(1, 0.5), (2, 0.125), (3, 0.375)]
    assert (tmp_path / "merged" / "tokenizer" / "tokenizer.txt").read_text() == "a tokenizer"


def test_what_cannot_be_merged(tmp_path):
    tensors = states(2)
    one, other = (make_checkpoint(tmp_path / name, each) for name, each in zip("ab", tensors, strict=True))
    for weights, message in (([0.5, 0.6], "sum to 1.1; they must sum to 1"), ([1.0], "1 weights for 2 checkpoints")):
        with pytest.raises(UserError, match=message):
            merge([one, other], weights, tmp_path / "merged", silent)
    with pytest.raises(UserError, match="exists already"):
        merge([one, other], [0.5, 0.5], one, silent)
    wider = make_checkpoint(tmp_path / "wider", tensors[0] | {"b": torch.zeros(8)})
    more = make_checkpoint(tmp_path / "more", tensors[0] | {"d": torch.zeros(8)})
    for different, name in ((wider, "b"), (more, "d")):
        with pytest.raises(UserError, match=f"of different models: they differ in {name}"):
            merge([different, one], [0.5, 0.5], tmp_path / "merged", silent)
    flip_a_byte(other / "__0_0.distcp")
    with pytest.raises(UserError, match="has the checksum"):
        merge([one, other], [0.5, 0.5], tmp_path / "merged", silent)
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_evaluation_of_a_merge_leaves_no_trace(tmp_path, recipe):
    from tests.checkpoint.runs import run_config, steps, weights_of
    from tests.dist.training import SyntheticStream, build_trainer

    settings = {"merge_eval_last": 2, "merge_eval_schedule": "linear", "save_interval": 1}
    config = run_config("DP2", tmp_path, checkpoint=settings, precision={"recipe": recipe}, data={"valid": "none"})
    config.train.train_iters, config.train.eval_iters = 3, 1
    streams = {"held": SyntheticStream(num_samples=8)}
    trainer = build_trainer(config, tmp_path, valid_streams=streams)
    records = []
    trainer.loggers.log = records.append
    trainer.run()
    merged = [record for record in records if "merged" in record]
    assert [(record["step"], record["merged"]) for record in merged] == [(2, [1, 2]), (3, [2, 3])]

    plain = build_trainer(run_config("DP2", tmp_path, precision={"recipe": recipe}), valid_streams=streams)
    plain.config.train.eval_iters = 1
    assert steps(plain, 3) == [record["loss"] for record in records if "loss" in record]
    assert all(torch.equal(value, weights_of(plain)[1][name]) for name, value in weights_of(trainer)[1].items())

    folders = [step_folder(tmp_path, 2), step_folder(tmp_path, 3)]
    if trainer.world.rank == 0:
        merge(folders, [0.5, 0.5], tmp_path / "merged", silent)
    torch.distributed.barrier()
    plain.checkpoints.load(tmp_path / "merged", moments=False)
    alone = plain.evaluate()["held"]
    assert merged[-1]["eval"] == {"held (merge of 2)": pytest.approx(alone, rel=1e-6)}
