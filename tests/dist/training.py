"""Tiny runs for the tests: configs, a stream of synthetic tokens, and a Trainer built from them on any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ling.config import Config, check_config
from ling.config.schema import DataConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig
from ling.data.datasets import BatchIterator
from ling.model.build import LingModel, build_model, wrap_model
from ling.model.init import global_names
from ling.observe.loggers import Loggers
from ling.observe.throughput import Throughput
from ling.optim.megatron import build_optimizer
from ling.parallel import groups
from ling.platform import get_platform
from ling.platform.select import choose
from ling.trainer import Trainer

VOCAB_SIZE, SEQUENCE_LENGTH = 250, 32

MOE = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    ffn_hidden_size=96,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=64,
    make_vocab_size_divisible_by=64,
    num_moe_experts=8,
    first_k_dense_replace=1,
    moe_ffn_hidden_size=32,
    moe_shared_expert_intermediate_size=48,
    moe_router_topk=2,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    moe_router_topk_scaling_factor=2.5,
    moe_z_loss_coeff=1e-3,
    moe_aux_loss_coeff=1e-2,
    mtp_num_layers=1,
)
"""A dense layer, three with experts, and MTP; every loss and every kind of layer takes part."""

DENSE = replace(
    MOE,
    num_moe_experts=None,
    moe_ffn_hidden_size=None,
    moe_shared_expert_intermediate_size=None,
    moe_router_num_groups=None,
    moe_router_group_topk=None,
)

RUN = Config(
    model=MOE,
    data=DataConfig(train="none", tokenizer="none", sequence_length=SEQUENCE_LENGTH),
    # Adam divides by the size of a gradient: without a floor, one that is all rounding error would count like any other
    optim=OptimConfig(lr=1e-3, lr_decay_style="constant", adam_eps=1e-5),
    precision=PrecisionConfig(recipe="fp32"),
    train=TrainConfig(train_iters=100, micro_batch_size=2, global_batch_size=4),
)


def tiny_config(world_size: int = 1, model: ModelConfig = MOE, **branches: dict[str, Any]) -> Config:
    """A checked config of a tiny run on so many ranks: `tiny_config(2, parallel={"expert_model_parallel_size": 2})`.

    `branches` are changes of a branch's settings; those of the model's go to `model` itself.
    """
    run = deepcopy(RUN)  # what a test does to its config must not reach the others'
    changed = {name: replace(getattr(run, name), **values) for name, values in branches.items()}
    config = replace(run, **{"model": deepcopy(model)} | changed)
    check_config(config, world_size)
    return config


class SyntheticStream:
    """Stands in for `ling.data.datasets.SampleStream`: sample i is a pure function of i, and can be learnt.

    A sample counts upwards from a number of its own by a step of its own, with some tokens drawn at random.
    """

    def __init__(self, vocab_size: int = VOCAB_SIZE, length: int = SEQUENCE_LENGTH, num_samples: int | None = None):
        self.vocab_size, self.length, self.num_samples = vocab_size, length, num_samples

    def sample(self, i: int) -> dict[str, np.ndarray]:
        """Sample number i, in the form of `SampleStream.sample`."""
        draw = np.random.Generator(np.random.Philox(i))
        run = (draw.integers(self.vocab_size) + draw.integers(1, 4) * np.arange(self.length + 1)) % self.vocab_size
        noise = draw.random(self.length + 1) < 0.1
        run[noise] = draw.integers(self.vocab_size, size=int(noise.sum()))
        return {
            "tokens": run[:-1],
            "labels": run[1:],
            "position_ids": np.arange(self.length),
            "loss_mask": np.ones(self.length, dtype=np.float32),
        }


def batch_of(stream: SyntheticStream, first: int, count: int) -> dict[str, torch.Tensor]:
    """Samples `first` and following as one batch."""
    samples = [stream.sample(i) for i in range(first, first + count)]
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


def build_single(config: Config, device: str = "cpu", seed: int | None = None) -> LingModel:
    """This rank's model, bare; the process groups are made anew for the config's layout."""
    groups.build_groups(config.parallel)
    groups.seed_random_states(config.run.seed)
    operations = {name: choice.implementation for name, choice in choose(config.runtime, "cpu").items()}
    bf16 = config.precision.recipe == "bf16"
    (chunk,) = build_model(config, torch.device(device), bf16=bf16, operations=operations, seed=seed)
    return chunk


def build_trainer(config: Config, run_dir: Path = Path("none"), **settings: Any) -> Trainer:
    """A Trainer of the config on this rank, on synthetic tokens; `settings` are further fields of it."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    # a backward pass outside the schedules leaves a scale behind whose shape they cannot use
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    groups.build_groups(config.parallel)
    groups.seed_random_states(config.run.seed)
    platform, world = get_platform("cpu"), groups.World.from_environment()
    operations = {name: choice.implementation for name, choice in choose(config.runtime, "cpu").items()}
    bf16 = config.precision.recipe == "bf16"
    model = build_model(config, platform.device, bf16=bf16, operations=operations)
    chunks = wrap_model(config, model, platform, bf16=bf16)
    defaults = {
        "train_stream": SyntheticStream(config.model.vocab_size, config.data.sequence_length),
        "valid_streams": {},
        "loggers": Loggers([]),
        "throughput": Throughput(1.0, world.size),
    }
    return Trainer(
        config=config,
        world=world,
        platform=platform,
        run_dir=run_dir,
        chunks=chunks,
        optimizer=build_optimizer(config, chunks, bf16=bf16, use_gloo_process_groups=False),
        **defaults | settings,
    )


def batches_of(trainer: Trainer) -> list[Iterator[Any]]:
    """This rank's micro-batches, from where the trainer is; one iterator for each of its model chunks."""
    train, data = trainer.config.train, groups.data()
    micro, whole = train.micro_batch_size, train.global_batch_size
    stream, consumed = trainer.train_stream, trainer.consumed_samples
    return [BatchIterator(stream, micro, whole, data.rank, data.size, consumed) for _ in trainer.chunks]


def bare_chunks(trainer: Trainer) -> list[LingModel]:
    """The trainer's model chunks without their wrappers."""
    chunks = []
    for chunk in trainer.chunks:
        while not isinstance(chunk, LingModel):
            chunk = chunk.module
        chunks.append(chunk)
    return chunks


@dataclass
class Place:
    """Which part of a model a rank holds: rank and number of the tensor-, expert-tensor- and expert-parallel ranks."""

    tp: tuple[int, int]
    etp: tuple[int, int]
    ep: tuple[int, int]

    @classmethod
    def here(cls) -> Place:
        """That of this rank."""
        parts = (groups.tensor(), groups.expert_tensor(), groups.expert())
        return cls(*((part.rank, part.size) for part in parts))


@dataclass
class Outcome:
    """What some steps of training gave on one rank; weights (this rank's parts) and router biases by global name."""

    place: Place
    losses: list[float] = field(default_factory=list)
    mtp_losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    router_biases: dict[str, torch.Tensor] = field(default_factory=dict)


def train_losses(config: Config, steps: int, change: Callable[[Trainer], None] | None = None) -> Outcome:
    """Train a tiny run for some steps on this rank of the world, and say how it went.

    `change`, a function of a module, may do something to the trainer first.
    """
    trainer = build_trainer(config)
    if change is not None:
        change(trainer)
    outcome = Outcome(Place.here())
    batches = batches_of(trainer)
    for _ in range(steps):
        record = trainer.train_step(batches)
        outcome.losses.append(record["loss"])
        outcome.mtp_losses.append(record.get("mtp_loss", 0.0))
        outcome.grad_norms.append(record["grad_norm"])
    trainer.gather_parameters()
    for chunk in bare_chunks(trainer):
        weights, biases = global_state(chunk)
        outcome.weights |= weights
        outcome.router_biases |= biases
    return outcome


def global_state(chunk: LingModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Copies of the parameters and of the routers' biases of a model chunk, by their global names."""
    buffers, names = dict(chunk.named_buffers()), global_names(chunk)
    weights = {names[name]: param.detach().clone() for name, param in chunk.named_parameters()}
    biases = {}
    for name in names:
        bias = name.removesuffix("weight") + "expert_bias"
        if bias in buffers:
            biases[names[name].removesuffix("weight") + "expert_bias"] = buffers[bias].clone()
    return weights, biases


def part_of(name: str, whole: torch.Tensor, place: Place) -> torch.Tensor:
    """The part of a parameter that a rank must hold, cut from the whole tensor by what its name says of its split.

    Rows of embedding, head, query/key/value, fc1 and the MTP projection, columns of what follows them, are split over
    TP (over ETP in the experts); gate and up each on their own; experts over EP; all else is whole everywhere.
    """
    if ".experts." in name:
        whole = whole.chunk(place.ep[1], dim=0)[place.ep[0]]
        if name.endswith("weight2"):
            return whole.chunk(place.etp[1], dim=2)[place.etp[0]]
        return torch.cat([half.chunk(place.etp[1], dim=1)[place.etp[0]] for half in whole.chunk(2, dim=1)], dim=1)
    rank, size = place.tp
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size, dim=0)[rank] for half in whole.chunk(2, dim=0)])
    if name.endswith(("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "eh_proj.weight")):
        return whole.chunk(size, dim=0)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(size, dim=1)[rank]
    return whole
