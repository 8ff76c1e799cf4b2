"""A run that is stopped and continued equals the uninterrupted one bit for bit, on every layout and number format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ling.config import Config
from ling.observe.loggers import Loggers
from ling.trainer import Trainer
from tests.dist.ranks import Ranks
from tests.dist.training import MOE, SyntheticStream, bare_chunks, build_trainer, tiny_config

STEPS, STOP = 5, 3
RAMP, BATCHES = {"global_batch_size": 8, "rampup_batch_size": [2, 2, 10]}, [2, 2, 4, 6, 8]
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
INTERLEAVED = PP | {"virtual_pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# name: ranks, sequences of a micro-batch (of 4 in a step), layout
LAYOUTS = {
    "one rank": (1, 2, {}),
    "DP2": (2, 1, {}),
    "DP2, overlapped": (2, 1, OVERLAP),
    "DP2, whole optimizer": (2, 1, {"use_distributed_optimizer": False}),
    "TP2+SP": (2, 2, TP),
    "PP2": (2, 1, PP),
    "PP2 interleaved": (2, 1, INTERLEAVED),
    "EP2": (2, 1, EP),
    "TP2xEP2": (2, 2, TP | EP),
    "TP2xPP2": (4, 1, TP | PP),
    "PP2xEP2": (4, 1, PP | EP),
    "DP2xEP2, overlapped": (4, 1, EP | OVERLAP),
}
DEFAULT = {("one rank", "bf16"), ("DP2, overlapped", "bf16"), ("TP2xEP2", "bf16"), ("PP2 interleaved", "fp32")}
CASES = [
    pytest.param(name, recipe, marks=() if (name, recipe) in DEFAULT else pytest.mark.slow)
    for name in LAYOUTS
    for recipe in ("fp32", "bf16")
]
COMPARED = (
    "step",
    "consumed_samples",
    "consumed_tokens",
    "global_batch_size",
    "data_crc32",
    "loss",
    "mtp_loss",
    "grad_norm",
    "lr",
)


class Records:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def log(self, record: dict[str, Any]) -> None:
        self.kept.append({key: record[key] for key in (*COMPARED, "eval") if key in record})

    def close(self) -> None:
        pass


def everything(trainer: Trainer) -> dict[str, Any]:
    """Every tensor and number that training on from here depends on, by name."""
    trainer.gather_parameters()
    found: dict[str, Any] = {}  # no random states: nothing draws random numbers, and the seeds of the two differ
    for number, chunk in enumerate(bare_chunks(trainer)):
        found |= {f"chunk {number} {name}": value for name, value in chunk.named_parameters()}
        found |= {f"chunk {number} {name}": value for name, value in chunk.named_buffers()}
    optimizers = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    for number, wrapped in enumerate(optimizers):
        for index, group in enumerate(wrapped.optimizer.param_groups):
            where = f"optimizer {number} group {index}"
            found |= {f"{where} {key}": value for key, value in group.items() if key != "params"}
            for place, param in enumerate(group["params"]):
                found[f"{where} param {place}"] = param
                state = wrapped.optimizer.state[param]
                found |= {f"{where} param {place} {key}": value for key, value in state.items()}
    return {name: value.detach().clone() if torch.is_tensor(value) else value for name, value in found.items()}


def run_to_the_end(trainer: Trainer, records: Records) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    trainer.loggers.loggers = [records]
    trainer.run()
    return records.kept, everything(trainer)


def different(config: Config, run_dir: Path) -> list[str]:
    """Run without a stop, then again from its checkpoint of step STOP; the names of what is not the same at the end."""
    streams = {"held": SyntheticStream(num_samples=8)}
    whole = build_trainer(config, run_dir, valid_streams=streams, loggers=Loggers([]))
    records, expected = run_to_the_end(whole, Records())
    later = replace(config, run=replace(config.run, seed=config.run.seed + 1))  # nothing may come from the seed
    resumed = build_trainer(later, run_dir / "resumed", valid_streams=streams, loggers=Loggers([]))
    resumed.load(run_dir / "checkpoints" / f"step_{STOP:08d}")
    again, found = run_to_the_end(resumed, Records())
    problems = [f"missing: {name}" for name in set(expected) ^ set(found)]
    for name in set(expected) & set(found):
        ours, theirs = found[name], expected[name]
        is_same = torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs
        problems += [] if is_same else [name]
    kept = [record for record in records if record["step"] > STOP]
    problems += [f"record {ours} is not {theirs}" for ours, theirs in zip(again, kept, strict=True) if ours != theirs]
    assert len(kept) == STEPS - STOP + 1, "the steps and an evaluation"
    return sorted(problems)


@pytest.mark.parametrize(("layout", "recipe"), CASES)
def test_continued_is_uninterrupted(ranks: Ranks, tmp_path, layout, recipe):
    size, micro_batch_size, parallel = LAYOUTS[layout]
    (tmp_path / "words.model").write_bytes(b"not looked into")
    config = tiny_config(
        size,
        MOE,
        parallel=parallel,
        data={"tokenizer": str(tmp_path / "words.model"), "valid": "none"},
        precision={"recipe": recipe},
        optim={"lr_decay_style": "cosine", "lr_warmup_iters": 2},
        train={"train_iters": STEPS, "micro_batch_size": micro_batch_size, "eval_iters": 1},
        checkpoint={"save_interval": STOP},
    )
    for rank, problems in enumerate(ranks.run(size, different, config, tmp_path)):
        assert problems == [], f"rank {rank}"


@pytest.mark.parametrize(("layout", "recipe"), [("DP2, overlapped", "bf16"), ("PP2 interleaved", "fp32")])
def test_continued_is_uninterrupted_while_the_batch_grows(ranks: Ranks, tmp_path, layout, recipe):
    size, _, parallel = LAYOUTS[layout]
    config = ramp_config(tmp_path, size, parallel, recipe)
    for rank, problems in enumerate(ranks.run(size, different, config, tmp_path)):
        assert problems == [], f"rank {rank}"


def ramp_config(tmp_path: Path, size: int, parallel: dict[str, Any], recipe: str = "fp32") -> Config:
    (tmp_path / "words.model").write_bytes(b"not looked into")
    return tiny_config(
        size,
        MOE,
        parallel=parallel,
        data={"tokenizer": str(tmp_path / "words.model"), "valid": "none"},
        precision={"recipe": recipe},
        train={"train_iters": STEPS, "micro_batch_size": 1, "eval_iters": 1, **RAMP},
        checkpoint={"save_interval": STOP},
    )


def test_another_number_of_ranks_goes_on_with_the_ramp(ranks: Ranks, tmp_path):
    whole = ranks.run(2, records_of, ramp_config(tmp_path, 2, EP), tmp_path, None)[0]
    assert [record["global_batch_size"] for record in whole] == BATCHES
    folder = tmp_path / "checkpoints" / f"step_{STOP:08d}"
    (again,) = ranks.run(1, records_of, ramp_config(tmp_path, 1, {}), tmp_path / "resumed", folder)
    exact = ("step", "consumed_samples", "consumed_tokens", "global_batch_size", "data_crc32", "lr")
    for ours, theirs in zip(again, whole[STOP:], strict=True):
        assert all(ours[key] == theirs[key] for key in exact)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def records_of(config: Config, run_dir: Path, checkpoint: Path | None) -> list[dict[str, Any]]:
    """The records of the steps of a run, from a checkpoint on where one is given."""
    trainer = build_trainer(config, run_dir, loggers=Loggers([]))
    if checkpoint is not None:
        trainer.load(checkpoint)
    return run_to_the_end(trainer, Records())[0]


def test_the_comparison_sees_a_lost_bit(ranks: Ranks, tmp_path):
    config = tiny_config(1, MOE, data={"tokenizer": "none"})
    (problems,) = ranks.run(1, spoiled, config)
    assert problems == ["chunk 0 decoder.layers.1.mlp.router.expert_bias", "optimizer 0 group 0 param 0 exp_avg_sq"]


def spoiled(config: Config) -> list[str]:
    """What `everything` shows when one bit of the router's bias and one of the optimizer's state are flipped."""
    trainer = build_trainer(config)
    trainer.run_dir = Path("none")
    batches = trainer._iterators(trainer.train_stream, 0, 0)
    trainer.train_step(batches)
    before = everything(trainer)
    optimizer = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])[0].optimizer
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg_sq"]
    bias = bare_chunks(trainer)[0].decoder.layers[1].mlp.router.expert_bias
    for tensor in (state, bias):
        tensor.view(torch.int32).view(-1)[0] ^= 1
    after = everything(trainer)
    return sorted(
        name for name in before if torch.is_tensor(before[name]) and not torch.equal(before[name], after[name])
    )
