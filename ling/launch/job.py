"""A job: where a run is to run, checked, from its config, its cluster file and the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ling.config import Config, UserError, check_config
from ling.config.derived import run_dir
from ling.config.duration import parse_duration
from ling.model.counts import count_parameters
from ling.plan.cluster import Cluster, load_cluster
from ling.plan.reliability import checkpoint_bytes

KINDS = ("local", "slurm", "torchrun")
LARGEST_SIGNAL_TIME = 65535
_RANGE = re.compile(r"(.*?)(\d+)\.\.(\d+)(.*)")
_MIN_FREE_GB = 1.0


@dataclass(frozen=True)
class Job:
    """What a job file says.

    Attributes:
        config_path, overrides: as `ling train` takes them.
        command: the `ling launch ...` that makes this job.
        hosts: of kind `torchrun`, one per node.
        min_free_gb: space that the run's folder needs: two checkpoints.
    """

    kind: str
    config: Config
    config_path: str
    overrides: tuple[str, ...]
    command: str
    cluster: Cluster
    nodes: int
    nproc: int
    hosts: tuple[str, ...]
    min_free_gb: float

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return run_dir(self.config)

    @property
    def uses_gpus(self) -> bool:
        """Whether its ranks have a GPU each."""
        return self.config.runtime.platform != "cpu"


def make_job(
    kind: str,
    config: Config,
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    cluster_path: str | None = None,
    nodes: int | None = None,
) -> Job:
    """The job of a config; what the command line gives wins over the config's `launch`.

    Raises:
        UserError: something is missing or does not fit.
    """
    settings = config.launch
    words = ["ling", "launch", kind, config_path, *overrides]
    words += ["--cluster", cluster_path] if cluster_path else []
    words += ["--nodes", str(nodes)] if nodes else []
    named = cluster_path or settings.cluster
    if kind == "slurm" and named is None:
        raise UserError("ling launch slurm: no cluster file; give --cluster FILE, or set launch.cluster")
    cluster = load_cluster(named) if named is not None else Cluster()
    hosts = tuple(host for text in settings.hosts for host in expand_hosts(text)) if kind == "torchrun" else ()
    count = _count_nodes(kind, nodes, settings.nodes, hosts)
    uses_gpus = config.runtime.platform != "cpu"
    nproc = settings.nproc_per_node or (cluster.node.gpus if named is not None and uses_gpus else 1)
    check_config(config, count * nproc)
    _check_times(config, cluster)
    _check_container(kind, config, cluster)
    space = 2 * checkpoint_bytes(config, count_parameters(config.model).total) / 1e9
    return Job(
        kind=kind,
        config=config,
        config_path=config_path,
        overrides=tuple(overrides),
        command=shlex.join(words),
        cluster=cluster,
        nodes=count,
        nproc=nproc,
        hosts=hosts,
        min_free_gb=max(_MIN_FREE_GB, space),
    )


def expand_hosts(text: str) -> list[str]:
    """`node08..10` as node08, node09, node10; a plain name as itself."""
    found = _RANGE.fullmatch(text)
    if found is None:
        if not re.fullmatch(r"[\w.@:-]+", text):
            raise UserError(f"launch.hosts: {text!r} is no name of a host; write node1, or node01..08 for eight")
        return [text]
    before, first, last, after = found.groups()
    if int(first) > int(last):
        raise UserError(f"launch.hosts: {text!r} names no host; write the smaller number first")
    names = (f"{before}{number:0{len(first)}}{after}" for number in range(int(first), int(last) + 1))
    return [host for name in names for host in expand_hosts(name)]


def job_seconds(config: Config, cluster: Cluster) -> float | None:
    """The time limit of the SLURM job in seconds; None: the scheduler's default."""
    for text, key in ((config.launch.time_limit, "launch.time_limit"), (cluster.slurm.time_limit, "slurm.time_limit")):
        if text is not None:
            return _seconds(text, key)
    return None


def stop_before_seconds(config: Config) -> int:
    """How long before its time limit the SLURM job is told to save and stop."""
    return round(_seconds(config.launch.stop_before, "launch.stop_before"))


def _seconds(text: str, key: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def _count_nodes(kind: str, given: int | None, configured: int, hosts: Sequence[str]) -> int:
    if kind == "local":
        if (given or configured) != 1:
            raise UserError("ling launch local: runs on this machine alone; use slurm or torchrun for several nodes")
        return 1
    if kind == "slurm":
        return given or configured
    if not hosts:
        raise UserError("ling launch torchrun: no hosts; set launch.hosts=[node1,node2], or [node01..08] for eight")
    if len(set(hosts)) != len(hosts):
        twice = next(host for host in hosts if hosts.count(host) > 1)
        raise UserError(f"launch.hosts: {twice} is named twice; name each host once")
    if given is not None and given != len(hosts):
        raise UserError(f"--nodes {given}: launch.hosts names {len(hosts)} hosts; leave --nodes out, or name {given}")
    return len(hosts)


def _check_times(config: Config, cluster: Cluster) -> None:
    limit, before = job_seconds(config, cluster), stop_before_seconds(config)
    if before > LARGEST_SIGNAL_TIME:
        raise UserError(f"launch.stop_before: SLURM knows at most {LARGEST_SIGNAL_TIME} seconds; give less")
    if limit is not None and before >= limit:
        raise UserError(
            f"launch.stop_before: {config.launch.stop_before} is no shorter than the job itself ({limit:g} s); "
            "shorten it, or raise launch.time_limit"
        )


def _check_container(kind: str, config: Config, cluster: Cluster) -> None:
    runtime = cluster.slurm.container_runtime
    if runtime not in ("pyxis", "apptainer"):
        raise UserError(f"slurm.container_runtime: {runtime!r} is not one of pyxis, apptainer")
    if config.launch.container is not None and kind != "slurm" and runtime == "pyxis":
        raise UserError(
            f"launch.container: pyxis works under SLURM only; for {kind} set slurm.container_runtime: apptainer in the "
            "cluster file"
        )
