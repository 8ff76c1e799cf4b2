"""Values that follow from a config: one definition of each, for the rules and for everybody else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ling.config.errors import UserError
from ling.config.keys import normal_activation
from ling.config.schema import Config, ModelConfig, ParallelConfig


@dataclass(frozen=True)
class Source:
    """One prepared data set: the prefix of its .bin/.idx, its weight in the blend, its name in logs."""

    path: str
    weight: float
    name: str


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


def num_microbatches(config: Config, world_size: int) -> int:
    """Forward passes of one step on each rank."""
    per_pass = config.train.micro_batch_size * data_parallel_size(config.parallel, world_size)
    return config.train.global_batch_size // per_pass


def data_sources(value: Any, where: str = "data") -> list[Source]:
    """The sources in any form that the config allows; no source for null. Raises UserError naming `where`.

    Forms: a prefix; a list of prefixes or `{path, weight, name}`; a mapping of names to prefixes. A source without a
    name is called by the last part of its path, or by the whole path where that would be ambiguous.
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
        sources.append(Source(path, float(entry.get("weight", 1.0)), name))
    twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise UserError(f"{where}: two sources are called {twice[0]!r}; give each its own name")
    return sources


def _check_entry(entry: dict[str, Any], where: str) -> None:
    unknown = sorted(set(entry) - {"path", "weight", "name"})
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r} in a source; the keys are path, weight, name")
    path, weight, name = entry.get("path"), entry.get("weight", 1.0), entry.get("name")
    if not isinstance(path, str) or not path:
        raise UserError(
            f"{where}: a source's path is the prefix of its .bin/.idx files, got {path!r}; write it as text"
        )
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise UserError(f"{where}: the weight of {path} must be a number greater than 0, got {weight!r}")
    if name is not None and (not isinstance(name, str) or not name):
        raise UserError(f"{where}: the name of {path} must be text, got {name!r}")
