"""The training loop on one or two ranks: what a step does and reports, evaluation, saving, and the end of a bad run."""

import gc
import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ling.checkpoint import folder as checkpoint_folder
from ling.config import Config
from ling.observe.loggers import Loggers
from ling.optim.schedules import learning_rate
from ling.trainer import NonFiniteError, Trainer
from tests.dist.training import (
    MOE,
    SyntheticStream,
    bare_chunks,
    batch_of,
    batches_of,
    build_trainer,
    global_state,
    tiny_config,
)

pytestmark = pytest.mark.ranks(1)

MODEL = replace(MOE, num_layers=2)


class Records:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []

    def log(self, record: dict[str, Any]) -> None:
        (self.evaluations if "eval" in record else self.steps).append(record)

    def close(self) -> None:
        pass


def config_of(**branches) -> Config:
    return tiny_config(dist.get_world_size(), MODEL, **branches)


@pytest.fixture
def tokenizer(tmp_path) -> dict[str, str]:
    """The settings of a run whose tokenizer can be saved with it."""
    path = tmp_path / "words.model"
    path.write_bytes(b"not looked into")
    return {"tokenizer": str(path)}


def steps(trainer: Trainer, count: int, key: str = "loss") -> list[float]:
    """Train so many steps."""
    batches = batches_of(trainer)
    return [trainer.train_step(batches)[key] for _ in range(count)]


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    weights, biases = global_state(bare_chunks(trainer)[0])
    return weights | biases


def parameter(trainer: Trainer, name: str) -> torch.nn.Parameter:
    return dict(bare_chunks(trainer)[0].named_parameters())[name]


def spoil_gradient(trainer: Trainer, name: str) -> None:
    """From here on one number of a parameter's gradient is inf."""

    def with_inf(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad.view(-1)[3] = torch.inf
        return grad

    parameter(trainer, name).register_hook(with_inf)


def test_a_gradient_that_is_not_finite_is_named():
    trainer = build_trainer(config_of())
    batches = batches_of(trainer)
    trainer.train_step(batches)
    spoil_gradient(trainer, "decoder.layers.1.self_attention.linear_qkv.weight")
    spoil_gradient(trainer, "decoder.final_layernorm.weight")
    with pytest.raises(NonFiniteError) as caught:
        trainer.train_step(batches)
    message = str(caught.value)
    assert message.startswith("step 2: loss 5.")
    assert message.endswith(
        "gradient norm inf; first in the gradient of rank 0: decoder.layers.1.self_attention.linear_qkv.weight"
    )


def test_a_loss_that_is_not_finite_ends_the_run():
    trainer = build_trainer(config_of())
    with torch.no_grad():
        parameter(trainer, "output_layer.weight")[7, 7] = torch.inf
    with pytest.raises(NonFiniteError, match=r"step 1: loss (nan|inf), .*rank 0: embedding.word_embeddings.weight"):
        steps(trainer, 1)


@pytest.mark.ranks(2)
def test_the_rank_that_has_it_is_named_on_all_ranks():
    trainer = build_trainer(config_of(parallel={"expert_model_parallel_size": 2}))
    if dist.get_rank() == 1:
        spoil_gradient(trainer, "decoder.layers.1.mlp.experts.weight2")
    with pytest.raises(
        NonFiniteError, match=r"step 1: .*; first in the .* rank 1: decoder.layers.1.mlp.experts.weight2"
    ):
        steps(trainer, 1)


def test_the_learning_rate_follows_the_schedule():
    optim = {"lr": 4e-3, "min_lr": 1e-3, "lr_decay_style": "cosine", "lr_warmup_iters": 2, "lr_decay_iters": 4}
    trainer = build_trainer(config_of(optim=optim))
    norm = parameter(trainer, "decoder.final_layernorm.weight")
    batches = batches_of(trainer)
    for step, expected in enumerate([2e-3, 4e-3, 2.5e-3, 1e-3, 1e-3], start=1):
        before = norm.detach().clone()
        record = trainer.train_step(batches)
        assert record["lr"] == pytest.approx(expected)
        assert record["lr"] == learning_rate(step, trainer.config.optim, trainer.config.train.train_iters)
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {record["lr"]}
        moved = float((norm - before).abs().max())
        assert 0.3 * expected < moved < 1.5 * expected  # Adam's steps are about as large as the rate


def test_what_a_step_reports():
    trainer = build_trainer(config_of())
    batches = batches_of(trainer)
    trainer.train_step(batches)
    record = trainer.train_step(batches)
    assert record["step"] == trainer.step == 2
    assert record["consumed_samples"] == trainer.consumed_samples == 8
    assert record["consumed_tokens"] == 8 * 32
    assert record["global_batch_size"] == 4
    assert trainer.last_loss == record["loss"]
    seconds = record["step_ms"] / 1e3
    assert record["tokens_per_s"] == pytest.approx(4 * 32 / seconds)
    assert {"mtp_loss", "grad_norm", "tflops_per_device", "peak_memory_gib"} < set(record)


def test_the_batch_grows():
    ramp = {"global_batch_size": 12, "rampup_batch_size": [4, 4, 16], "train_iters": 5, "eval_iters": 2}
    trainer = build_trainer(config_of(train=ramp))
    batches, records = batches_of(trainer), []
    for _ in range(5):
        records.append(trainer.train_step(batches))
        record, seconds = records[-1], records[-1]["step_ms"] / 1e3
        first = record["consumed_samples"] - record["global_batch_size"]
        samples = batch_of(trainer.train_stream, first, record["global_batch_size"])["tokens"].numpy()
        assert record["data_crc32"] == f"{sum(map(zlib.crc32, samples)) % 2**32:08x}"
        assert record["tokens_per_s"] == pytest.approx(32 * record["global_batch_size"] / seconds)
    assert [record["global_batch_size"] for record in records] == [4, 4, 8, 12, 12]
    assert [record["consumed_samples"] for record in records] == [4, 8, 16, 28, 40]
    constant = build_trainer(config_of(train={"global_batch_size": 4}))
    constant_batches = batches_of(constant)
    for record in records[:2]:
        same = constant.train_step(constant_batches)
        assert all(same[key] == record[key] for key in ("loss", "mtp_loss", "grad_norm", "data_crc32"))


def test_evaluation_takes_the_full_batch_and_a_stop_leaves_room_for_a_larger_step():
    streams = {"held": SyntheticStream(num_samples=24)}
    ramp = {"global_batch_size": 12, "rampup_batch_size": [4, 4, 16], "eval_iters": 2}
    trainer = build_trainer(config_of(train=ramp), valid_streams=streams)
    whole = build_trainer(config_of(train={"global_batch_size": 12, "eval_iters": 2}), valid_streams=streams)
    assert trainer.evaluate() == whole.evaluate()
    batches = batches_of(trainer)
    found = [trainer._growth(trainer.train_step(batches)) for _ in range(4)]
    assert found == [8 / 4, 12 / 4, 12 / 8, 1], "of the batches 4, 4, 8, 12, 12, 12"


def test_evaluation_is_the_same_every_time_and_changes_nothing():
    config = config_of(train={"eval_iters": 2})
    plain = build_trainer(config)
    undisturbed = steps(plain, 3), state_of(plain)
    streams = {"short": SyntheticStream(num_samples=9), "long": SyntheticStream(num_samples=100)}
    records = Records()
    trainer = build_trainer(config, valid_streams=streams, loggers=Loggers([records]))
    batches, losses = batches_of(trainer), []
    for _ in range(3):
        first, again = trainer.evaluate(), trainer.evaluate()
        assert first == again
        assert first["short"] == first["long"]  # both have two batches and more, which are the same
        losses.append(trainer.train_step(batches)["loss"])
    assert losses == undisturbed[0]
    assert all(torch.equal(value, undisturbed[1][name]) for name, value in state_of(trainer).items())
    assert [record["step"] for record in records.evaluations] == [0, 0, 1, 1, 2, 2]
    assert records.evaluations[-1]["eval"] == again
    assert records.evaluations[0]["eval"]["long"] > records.evaluations[-1]["eval"]["long"]


@pytest.mark.ranks(2)
def test_overlapped_gathering_is_complete_where_the_weights_are_used(tmp_path, tokenizer):
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    evaluations, weights = [], []
    for number, parallel in enumerate(({}, overlap)):
        streams = {"held": SyntheticStream(num_samples=8)}
        config = config_of(data=tokenizer, parallel=parallel, train={"eval_iters": 1})
        trainer = build_trainer(config, tmp_path / str(number), valid_streams=streams)
        batches = batches_of(trainer)
        evaluations.append([trainer.evaluate()])
        for _ in range(2):
            trainer.train_step(batches)
            evaluations[-1].append(trainer.evaluate())
        trainer.train_step(batches)
        trainer.load(trainer.save())
        weights.append(state_of(trainer))
        trainer.train_step(batches)
    assert evaluations[0] == evaluations[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_evaluation_is_the_mean_over_the_held_out_tokens():
    stream = SyntheticStream(num_samples=8)
    trainer = build_trainer(config_of(train={"eval_iters": 5}), valid_streams={"all": stream})
    batch = batch_of(stream, 0, 8)
    with torch.no_grad():
        logits = bare_chunks(trainer)[0].eval()(batch["tokens"], batch["position_ids"], None)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert trainer.evaluate()["all"] == pytest.approx(float(expected), rel=1e-6)


def test_micro_batches_add_up():
    results = []
    for size in (1, 2, 4):
        trainer = build_trainer(config_of(train={"micro_batch_size": size}))
        assert trainer.num_microbatches == 4 // size
        results.append((steps(trainer, 3), steps(trainer, 3, "grad_norm"), steps(trainer, 3, "mtp_loss")))
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_a_saved_run_continues_as_if_never_stopped(tmp_path, tokenizer, recipe):
    records = [Records(), Records()]
    config = config_of(
        data=tokenizer,
        precision={"recipe": recipe},
        train={"train_iters": 6},
        optim={"lr_decay_style": "cosine", "lr_warmup_iters": 2},
        checkpoint={"save_interval": 3},
    )
    whole = build_trainer(config, tmp_path, loggers=Loggers([records[0]]))
    whole.run()
    resumed = build_trainer(config, tmp_path / "resumed", loggers=Loggers([records[1]]))
    with torch.no_grad():
        for param in bare_chunks(resumed)[0].parameters():
            param.add_(1.0)  # all of it must come from the checkpoint
    resumed.load(checkpoint_folder.step_folder(tmp_path, 3))
    assert (resumed.step, resumed.consumed_samples) == (3, 12)
    resumed.run()
    for ours, theirs in zip(records[1].steps, records[0].steps[3:], strict=True):
        for key in ("step", "consumed_samples", "loss", "mtp_loss", "grad_norm", "lr"):
            assert ours[key] == theirs[key], key
    assert all(torch.equal(value, state_of(whole)[name]) for name, value in state_of(resumed).items())


def test_a_resumed_run_takes_its_own_hyperparameters(tmp_path, tokenizer):
    trainer = build_trainer(config_of(data=tokenizer), tmp_path)
    steps(trainer, 1)
    trainer.save()
    resumed = build_trainer(config_of(optim={"weight_decay": 0.3, "adam_beta2": 0.9}), tmp_path)
    resumed.load(checkpoint_folder.step_folder(tmp_path, 1))
    groups = resumed.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert {group["betas"] for group in groups} == {(0.9, 0.9)}


def test_a_run_from_start_to_end(tmp_path, tokenizer):
    config = config_of(
        train={"train_iters": 5, "eval_interval": 2, "eval_iters": 1, "gc_interval": 2},
        data={"valid": "none"} | tokenizer,
        checkpoint={"save_interval": 3},
    )
    records = Records()
    streams = {"held": SyntheticStream(num_samples=4)}
    trainer = build_trainer(config, tmp_path, valid_streams=streams, loggers=Loggers([records]))
    trainer.run()
    assert not gc.isenabled()
    assert [record["step"] for record in records.steps] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in records.evaluations] == [2, 4, 5]
    found = checkpoint_folder.checkpoints(tmp_path)
    assert [step for step, _ in found] == [3, 5]
    manifest = checkpoint_folder.read_manifest(found[-1][1])
    assert (manifest.step, manifest.consumed_samples, manifest.world_size) == (5, 20, 1)
    assert manifest.loss == records.steps[-1]["loss"]


def test_the_norm_is_logged_without_clipping_and_before_it():
    norms, left = {}, {}
    for clip in (0.0, 1000.0, 0.1):
        trainer = build_trainer(config_of(optim={"clip_grad": clip}))
        norms[clip] = steps(trainer, 1, "grad_norm")
        grads = [param.main_grad.norm() for param in bare_chunks(trainer)[0].parameters()]
        left[clip] = float(torch.stack(grads).norm())
    assert norms[0.0] == norms[1000.0] == norms[0.1]
    assert left[0.0] == pytest.approx(norms[0.0][0], rel=1e-5)
    assert left[1000.0] == pytest.approx(norms[0.0][0], rel=1e-5)
    assert left[0.1] == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("patterns", [[], ["*word_embeddings*"]])
def test_what_decays(patterns):
    config = config_of(optim={"weight_decay": 0.5, "no_weight_decay": patterns, "lr": 1e-2})
    trainer = build_trainer(config)
    exempt = sum(
        param.numel()
        for name, param in bare_chunks(trainer)[0].named_parameters()
        if param.dim() == 1 or (patterns and "word_embeddings" in name)
    )
    in_groups = {0.0: 0, 0.5: 0}
    for group in trainer.optimizer.param_groups:
        in_groups[group["weight_decay"]] += sum(param.numel() for param in group["params"])
    everything = sum(param.numel() for param in bare_chunks(trainer)[0].parameters())
    assert in_groups == {0.0: exempt, 0.5: everything - exempt}
    # the padding of the vocabulary has no gradient in the embedding: there, decay is all that happens
    padding = parameter(trainer, "embedding.word_embeddings.weight")[250:]
    before = padding.detach().clone()
    steps(trainer, 2)
    torch.testing.assert_close(padding.detach(), before if patterns else before * (1 - 1e-2 * 0.5) ** 2)
