"""The schema of a cluster file: the machines, their network, storage and failures, and how to ask SLURM for them.

Units are in the names; GB is 10^9 bytes, GiB 2^30. The defaults are nodes of eight H100.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ling.config.errors import UserError
from ling.config.keys import did_you_mean
from ling.config.yaml_io import read_yaml


def entry(default: Any, doc: str) -> Any:
    """A field of a cluster file: default and one-line description."""
    metadata = {"doc": doc}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Gpu:
    name: str = entry("H100", "what people call the GPU")
    memory_gib: float = entry(79.1, "memory that a process can allocate, as torch reports it")
    peak_bf16_tflops: float = entry(989.4, "dense peak, without sparsity")
    peak_fp8_tflops: float = entry(1978.9, "dense peak, without sparsity")
    peak_fp32_tflops: float = entry(66.9, "peak of fp32 outside the tensor cores")
    memory_bandwidth_gb_s: float = entry(3350.0, "peak of the device memory")


@dataclass(frozen=True)
class Node:
    gpus: int = entry(8, "GPUs of one node")
    intra_node_gb_s: float = entry(450.0, "GPU to GPU within a node, per GPU and direction (NVLink)")
    inter_node_gb_s: float = entry(50.0, "between nodes, per GPU and direction (400 Gbit/s is 50)")
    numa_binding: str | None = entry(None, "ranks to the cores near their GPU, as torchrun's --numa-binding: node")


@dataclass(frozen=True)
class Storage:
    write_gb_s: float = entry(20.0, "what the checkpoint file system takes from all nodes together")
    write_gb_s_per_node: float = entry(2.0, "what one node can write to it")


@dataclass(frozen=True)
class Reliability:
    gpu_mtbf_hours: float = entry(
        50000.0,
        "mean time between failures of one GPU and its share of the node; a job of N GPUs fails N times as often",
    )
    restart_minutes: float = entry(10.0, "from a failure to the first step after it, lost steps not counted")


@dataclass(frozen=True)
class Slurm:
    partition: str | None = entry(None, "partition (queue); null: the scheduler's default")
    account: str | None = entry(None, "account that pays")
    qos: str | None = entry(None, "quality of service")
    constraint: str | None = entry(None, "feature that the nodes must have")
    time_limit: str | None = entry(None, "longest job, as SLURM writes it: D-HH:MM:SS")
    gpu_option: str | None = entry(None, "how GPUs are asked for, such as gres=gpu:8; null: gpus-per-node=8")
    options: dict[str, str] = entry({}, "further options of sbatch, such as cpus-per-task: 96, reservation: NAME")
    container_runtime: str = entry("pyxis", "what runs launch.container: pyxis or apptainer")
    container_mounts: str | None = entry(None, "folders that a container sees: /data:/data,/home:/home")


@dataclass(frozen=True)
class Cluster:
    """A cluster file."""

    name: str = entry("h100", "name of the cluster")
    gpu: Gpu = field(default_factory=Gpu)
    node: Node = field(default_factory=Node)
    storage: Storage = field(default_factory=Storage)
    reliability: Reliability = field(default_factory=Reliability)
    slurm: Slurm = field(default_factory=Slurm)
    environment: dict[str, str] = entry({}, "environment variables of every rank, such as NCCL_SOCKET_IFNAME")
    setup: str | None = entry(None, "shell lines before anything else on every node, such as module load cuda")

    def bandwidth(self, span: int) -> float:
        """Bytes per second, per GPU and direction, of a ring over `span` neighbouring GPUs."""
        within = span <= self.node.gpus
        return (self.node.intra_node_gb_s if within else self.node.inter_node_gb_s) * 1e9


_SECTIONS: dict[str, type] = {
    "gpu": Gpu,
    "node": Node,
    "storage": Storage,
    "reliability": Reliability,
    "slurm": Slurm,
}


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file. Raises UserError with the key and the mend."""
    path = Path(path)
    values = read_yaml(path, named_by="--cluster")
    known = cluster_keys()
    parts: dict[str, Any] = {}
    for key, value in values.items():
        if key in _SECTIONS:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key}: expected a mapping, got {value!r:.40}; write {key}: {{name: value}}")
            for name in value:
                if f"{key}.{name}" not in known:
                    raise UserError(
                        f"{path}: unknown key {key}.{name}{did_you_mean(f'{key}.{name}', known) or _list()}"
                    )
            parts[key] = _SECTIONS[key](
                **{name: _checked(path, f"{key}.{name}", known[f"{key}.{name}"], v) for name, v in value.items()}
            )
        elif key in known:
            parts[key] = _checked(path, key, known[key], value)
        else:
            raise UserError(f"{path}: unknown key {key}{did_you_mean(key, [*_SECTIONS, *known]) or _list()}")
    return Cluster(**parts)


@cache
def cluster_keys() -> dict[str, dataclasses.Field[Any]]:
    """Every setting of a cluster file by its dotted name."""
    table = {row.name: row for row in dataclasses.fields(Cluster) if row.name not in _SECTIONS}
    for section, cls in _SECTIONS.items():
        table |= {f"{section}.{row.name}": row for row in dataclasses.fields(cls)}
    return table


def _list() -> str:
    return f"; the keys are {', '.join(cluster_keys())}"


def _checked(path: Path, key: str, row: dataclasses.Field[Any], value: Any) -> Any:
    """The value if it is of the field's kind."""
    expected = str(row.type)
    if value is None and "None" in expected:
        return None
    if expected.startswith("dict"):
        if isinstance(value, dict):
            return {name: str(text) for name, text in value.items()}
        raise UserError(f"{path}: {key}: expected a mapping of names to texts, got {value!r:.40}")
    if expected.startswith("str"):
        if isinstance(value, str) and value:
            return value
        raise UserError(f"{path}: {key}: expected text, got {value!r:.40}; quote it")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0 or (expected == "int" and value != int(value)):
        kind = "a whole number" if expected == "int" else "a number"
        raise UserError(f"{path}: {key}: expected {kind} greater than 0, got {value!r:.40}; {row.metadata['doc']}")
    return int(value) if expected == "int" else float(value)
