"""What the checks before a start have found: a small file per node and one of all ranks, in `job/preflight/START/`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ling.job.files import job_folder, read_json, replace_json

RANKS = "ranks"
MAX_CLOCK_DIFFERENCE_S = 5.0
SAME_EVERYWHERE = ("driver", "kernel_driver", "python", "ling", "torch", "nccl", "megatron-core")


@dataclass(frozen=True)
class Problems:
    """What is wrong with a start's nodes: the nodes at fault, and a reason for each."""

    nodes: tuple[str, ...]
    reasons: tuple[str, ...]


def report_folder(run_dir: Path, start: str) -> Path:
    """Where the reports of a start lie; `start` is `JOB.NUMBER`."""
    return job_folder(run_dir) / "preflight" / start


def write_report(run_dir: Path, start: str, name: str, report: Mapping[str, Any]) -> None:
    """Write the report of a node, or of all ranks together (`RANKS`)."""
    replace_json(report_folder(run_dir, start) / f"{name}.json", report)


def problems_of(run_dir: Path, start: str, nodes: Sequence[str]) -> Problems | None:
    """What the reports of a start say; None where no checks were made."""
    folder = report_folder(run_dir, start)
    if not folder.is_dir():
        return None
    reports = {node: read_json(folder / f"{node}.json") for node in nodes}
    found = [(node, "no answer to the preflight") for node, report in reports.items() if report is None]
    known = {node: report for node, report in reports.items() if report is not None}
    found += [(node, problem) for node, report in known.items() for problem in report.get("problems", [])]
    found += differences({node: report.get("versions", {}) for node, report in known.items()})
    found += clock_differences({node: report["clock_s"] for node, report in known.items() if "clock_s" in report})
    together = read_json(folder / f"{RANKS}.json") or {}
    found += [(node, problem) for node, problem in together.get("problems", [])]
    bad = {node for node, _ in found}
    reasons = tuple(f"{node}: {text}" if node else text for node, text in found)
    return Problems(tuple(node for node in nodes if node in bad), reasons)


def differences(versions: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    """Nodes whose versions are not those of most nodes; where there is no majority, no node is named."""
    found: list[tuple[str, str]] = []
    for name in SAME_EVERYWHERE:
        told = {node: mine[name] for node, mine in versions.items() if mine.get(name)}
        count = Counter(told.values()).most_common()
        if len(count) < 2:
            continue
        usual, times = count[0]
        if times == count[1][1]:
            found.append(("", f"{name} differs between nodes: {', '.join(f'{n} has {v}' for n, v in told.items())}"))
        else:
            found += [(n, f"{name} is {v}, elsewhere {usual}") for n, v in told.items() if v != usual]
    return found


def clock_differences(clocks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Nodes whose clock, measured against the shared file system's, is far from the middle of all."""
    middle = median(clocks.values())
    return [
        (node, f"its clock is {clock - middle:+.1f} s off")
        for node, clock in clocks.items()
        if abs(clock - middle) > MAX_CLOCK_DIFFERENCE_S
    ]


def median(values: Iterable[float]) -> float:
    """The lower middle value; 0 of none."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2] if ordered else 0.0
