"""Values that follow from a config: one definition of each, for the rules and for everybody else."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ling.config.errors import UserError
from ling.config.keys import normal_activation
from ling.config.schema import Config, ModelConfig, ParallelConfig

UNITS = ("weight", "tokens", "epochs")


@dataclass(frozen=True)
class Source:
    """One prepared data set: the prefix of its .bin/.idx, how much of it, its name in logs.

    `weight` counts in `unit`: `weight` (a share of the samples), `tokens` or `epochs`. `span` is the part of its
    documents that is used, as fractions.
    """

    path: str
    weight: float
    name: str
    unit: str = "weight"
    span: tuple[float, float] = (0.0, 1.0)


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up, the same on every layout."""
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


def kv_channels(model: ModelConfig) -> int:
    """Size of one attention head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def num_query_groups(model: ModelConfig) -> int:
    """Key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def activation_for(model: ModelConfig, kind: str) -> dict[str, Any]:
    """The activation `{name: ..., **parameters}` of a kind of FFN: `dense`, `shared` or `routed`."""
    own = getattr(model, f"{kind}_activation")
    return normal_activation(model.activation if own is None else own)


def activation_names(model: ModelConfig) -> set[str]:
    """The names of the activations that the FFNs of the model have."""
    kinds = ("dense",) if model.num_moe_experts is None else ("dense", "shared", "routed")
    return {str(activation_for(model, kind)["name"]) for kind in kinds}


def run_dir(config: Config) -> Path:
    """The run's folder."""
    return Path(config.run.dir) if config.run.dir is not None else Path("runs") / config.run.name


def expert_tensor_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that share each expert's matrices: as given, else 1 with EP > 1 and TP without."""
    if parallel.expert_tensor_parallel_size is not None:
        return parallel.expert_tensor_parallel_size
    return 1 if parallel.expert_model_parallel_size > 1 else parallel.tensor_model_parallel_size


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the (dense) model on so many ranks."""
    replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return world_size // (replica * parallel.context_parallel_size)


def num_microbatches(config: Config, world_size: int, batch_size: int | None = None) -> int:
    """Forward passes on each rank of a step of so many sequences, by default of the full global batch."""
    per_pass = config.train.micro_batch_size * data_parallel_size(config.parallel, world_size)
    return (config.train.global_batch_size if batch_size is None else batch_size) // per_pass


def global_batch_size_at(config: Config, consumed_samples: int) -> int:
    """Sequences of the step that comes after so many samples: the full global batch, or less during the ramp.

    With `train.rampup_batch_size: [start, increment, samples]` the batch is, up to `samples` consumed samples,
    start + int(consumed / (samples / n)) * increment with n = (global_batch_size - start) / increment, and the full one
    from then on. The formula and its rounding are Megatron-LM's (`--rampup-batch-size`,
    `RampupBatchsizeNumMicroBatchesCalculator.update` in megatron/core/num_microbatches_calculator.py).
    """
    train = config.train
    if train.rampup_batch_size is None or consumed_samples > train.rampup_batch_size[2]:
        return train.global_batch_size
    start, increment, samples = train.rampup_batch_size
    per_increment = samples / ((train.global_batch_size - start) // increment)
    return start + int(consumed_samples / per_increment) * increment


def consumed_samples_after(config: Config, steps: int) -> int:
    """Samples that the first so many steps of a run take, from the start of its data."""
    train, consumed = config.train, 0
    if train.rampup_batch_size is not None:
        start, increment, samples = train.rampup_batch_size
        per_increment = samples / ((train.global_batch_size - start) // increment)
        while steps and consumed <= samples:
            batch = global_batch_size_at(config, consumed)
            # where the next increment begins, and a sample less, which is more than the rounding of the division
            below = int(((batch - start) // increment + 1) * per_increment) - 1
            together = min(steps, max(1, (below - consumed) // batch))
            consumed += together * batch
            steps -= together
    return consumed + steps * train.global_batch_size


def data_sources(value: Any, where: str = "data") -> list[Source]:
    """The sources in any form that the config allows; no source for null. Raises UserError naming `where`.

    Forms: a prefix; a list of prefixes or `{path, weight, name}`, with `tokens` or `epochs` in place of `weight`; a
    mapping of names to prefixes. A source without a name is called by the last part of its path, or by the whole path
    where that would be ambiguous.
    """
    if value is None:
        return []
    if isinstance(value, dict):
        entries = [{"path": path, "name": name} for name, path in value.items()]
    else:
        entries = [
            entry if isinstance(entry, dict) else {"path": entry}
            for entry in (value if isinstance(value, list) else [value])
        ]
    if not entries:
        raise UserError(f"{where}: names no data; give a prefix of .bin/.idx files, or a list of them")
    for entry in entries:
        _check_entry(entry, where)
    short = Counter(Path(entry["path"]).name for entry in entries)
    sources = []
    for entry in entries:
        path = entry["path"]
        last = Path(path).name
        name = entry.get("name") or (last if short[last] == 1 else path)
        unit = next((key for key in UNITS if key in entry), "weight")
        sources.append(Source(path, float(entry.get(unit, 1.0)), name, unit))
    twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise UserError(f"{where}: two sources are called {twice[0]!r}; give each its own name")
    shares = [source.path for source in sources if source.unit == "weight"]
    if 0 < len(shares) < len(sources):
        raise UserError(
            f"{where}: {shares[0]} has a weight and other sources have tokens or epochs; give each source a weight, or "
            "each tokens or epochs"
        )
    return sources


def train_sources(config: Config) -> list[Source]:
    """The sources of the training data, with data.split the first part of each."""
    return _parts(config, data_sources(config.data.train, "data.train"), 0)


def valid_sources(config: Config) -> list[Source]:
    """The held-out sources: those of data.valid, or data.split's second part of the training data."""
    return _held_out(config, config.data.valid, "data.valid", 1)


def test_sources(config: Config) -> list[Source]:
    """The sources of the last test: those of data.test, or data.split's third part of the training data."""
    return _held_out(config, config.data.test, "data.test", 2)


def cache_dir(config: Config) -> Path:
    """The folder of the data's shuffles: data.cache_dir, or one beside the run's folder, which several runs share."""
    return run_dir(config).parent / "data_cache" if config.data.cache_dir is None else Path(config.data.cache_dir)


def _held_out(config: Config, value: Any, where: str, part: int) -> list[Source]:
    if config.data.split is None:
        return data_sources(value, where)
    return _parts(config, data_sources(config.data.train, "data.train"), part)


def _parts(config: Config, sources: list[Source], part: int) -> list[Source]:
    """The sources cut down to a part of data.split; none where the part is empty."""
    if config.data.split is None:
        return sources
    shares = [share / math.fsum(config.data.split) for share in config.data.split]
    ends = [0.0, *(min(1.0, math.fsum(shares[: end + 1])) for end in range(len(shares) - 1)), 1.0]
    if part >= len(shares) or ends[part] == ends[part + 1]:
        return []
    return [replace(source, span=(ends[part], ends[part + 1])) for source in sources]


def _check_entry(entry: dict[str, Any], where: str) -> None:
    unknown = sorted(set(entry) - {"path", "name", *UNITS})
    if unknown:
        raise UserError(
            f"{where}: unknown key {unknown[0]!r} in a source; the keys are path, name, and one of {', '.join(UNITS)}"
        )
    path, name = entry.get("path"), entry.get("name")
    if not isinstance(path, str) or not path:
        raise UserError(
            f"{where}: a source's path is the prefix of its .bin/.idx files, got {path!r}; write it as text"
        )
    units = [unit for unit in UNITS if unit in entry]
    if len(units) > 1:
        raise UserError(f"{where}: {path} has {units[0]} and {units[1]}; give one of them")
    for unit in units:
        amount = entry[unit]
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 < amount < float("inf"):
            what = "weight" if unit == "weight" else f"number of {unit}"
            raise UserError(f"{where}: the {what} of {path} must be a number greater than 0, got {amount!r}")
    if name is not None and (not isinstance(name, str) or not name):
        raise UserError(f"{where}: the name of {path} must be text, got {name!r}")
