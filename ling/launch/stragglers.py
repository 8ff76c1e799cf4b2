"""Ranks that keep the others waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ling.launch.reports import median

FACTOR = 1.15
MAX_NAMED = 16


@dataclass(frozen=True)
class SlowRank:
    """A rank, its machine, its milliseconds of work per step, and these over the middle rank's."""

    rank: int
    node: str
    busy_ms: float
    ratio: float


def slow_ranks(busy_ms: Sequence[float], nodes: Sequence[str], factor: float = FACTOR) -> list[SlowRank]:
    """The ranks that work longer than the others on the same amount, the slowest first, at most `MAX_NAMED`.

    Args:
        busy_ms: milliseconds per step in which each rank worked and did not wait for another one, in the order of the
            ranks. Whole steps take the same time everywhere, since ranks wait for each other in every one.
        nodes: the machine of each rank.
        factor: times the middle rank's time, from which a rank counts as slow.
    """
    if len(busy_ms) != len(nodes):
        raise ValueError(f"{len(busy_ms)} times for {len(nodes)} ranks")
    middle = median(busy_ms)
    found = [
        SlowRank(rank, nodes[rank], round(ms, 3), round(ms / middle, 3))
        for rank, ms in enumerate(busy_ms)
        if middle > 0 and ms > factor * middle
    ]
    return sorted(found, key=lambda slow: -slow.busy_ms)[:MAX_NAMED]


def metrics_record(step: int, found: Sequence[SlowRank]) -> dict[str, Any]:
    """The line for `metrics.jsonl`, which `ling status` reads."""
    return {"step": step, "slow_ranks": [asdict(slow) for slow in found]}


def console_line(step: int, found: Sequence[SlowRank]) -> str:
    """The same for people."""
    ranks = ", ".join(f"rank {slow.rank} ({slow.node}) {slow.ratio:.2f}x" for slow in found[:4])
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return f"step {step}: slow ranks: {ranks}{more} of the middle rank's time"
