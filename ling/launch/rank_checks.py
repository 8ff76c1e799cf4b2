"""Checks of all ranks together, under torchrun: matrix products, memory, and an all-reduce with its bandwidth.

Every rank tells its stage and its result through torchrun's store. Rank 0 waits for all of them, writes the report and
lets the others go; a rank that does not answer in time is named with the stage at which it stands.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ling.job.files import node_name
from ling.launch.node_checks import versions
from ling.launch.reports import RANKS, differences, median, write_report
from ling.parallel.groups import World
from ling.platform import Platform

TIMEOUT_S = 180.0
SLOW = 0.7
"""A device this much slower than the middle one is named."""
STAGES = ("started", "matrix products", "memory", "all-reduce", "finished")
_SIZE = {"cuda": 8192, "cpu": 256}
_REPEATS = 5
_REDUCED_BYTES = {"cuda": 1 << 28, "cpu": 1 << 20}
_MEMORY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}
_MEMORY_SHARE = 0.9


class _OthersUnfit(Exception):  # noqa: N818 - no error of this rank's
    """Another rank has failed already."""


class Store:
    """Small objects by name, in torchrun's store."""

    def __init__(self, world: World, name: str, timeout_s: float = TIMEOUT_S) -> None:
        timeout = datetime.timedelta(seconds=timeout_s)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        tcp = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        self._store = dist.PrefixStore(f"ling/preflight/{name}", tcp)
        self._rank = world.rank

    def tell(self, key: str, value: Any) -> None:
        """Write an entry."""
        self._store.set(key, json.dumps(value))

    def known(self, key: str) -> Any:
        """Read an entry; None where there is none yet."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def wait(self, key: str) -> Any:
        """Read an entry as soon as it is there."""
        return json.loads(self._store.get(key))


def check_ranks(platform: Platform, world: World, run_dir: Path | None, start: str) -> dict[str, Any]:
    """Check this rank and its connections. Returns the report on rank 0, and this rank's own result elsewhere.

    Ends the process with code 1 after `TIMEOUT_S`, since a collective that hangs cannot be given up otherwise.
    """
    store = Store(world, start)
    timer = threading.Timer(TIMEOUT_S, _give_up, (store, world, run_dir, start))
    timer.daemon = True
    timer.start()
    mine: dict[str, Any] = {"rank": world.rank, "node": node_name(), "problems": [], "versions": _versions()}
    try:
        _stages(platform, world, store, mine)
    except _OthersUnfit:
        mine["is_waiting"] = True
    except Exception as error:  # whatever a broken device raises is the result
        mine["problems"].append(f"rank {world.rank}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    store.tell(f"result/{world.rank}", mine)
    if world.rank == 0:
        report = summarize([store.wait(f"result/{rank}") for rank in range(world.size)])
        if run_dir is not None:
            write_report(run_dir, start, RANKS, report)
        store.tell("over", True)
    else:
        report = mine
        store.wait("over")
    timer.cancel()
    if world.rank == 0:  # the store may live in this process' launcher: let the others read the last word
        time.sleep(0.5)
    return report


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of all ranks: `problems` as `[node, text]`, slowest and middle device, bandwidth, versions."""
    problems = [[result["node"], problem] for result in results for problem in result["problems"]]
    problems += [list(pair) for pair in differences({result["node"]: result["versions"] for result in results})]
    rates = [result["tflops"] for result in results if "tflops" in result]
    middle = median(rates)
    problems += [
        [result["node"], f"rank {result['rank']}: {result['tflops']:.3g} TFLOP/s, others {middle:.3g}"]
        for result in results
        if result.get("device") == "cuda" and result.get("tflops", middle) < SLOW * middle
    ]
    report: dict[str, Any] = {"problems": problems, "world_size": len(results), "versions": results[0]["versions"]}
    if rates:
        report |= {"tflops": middle, "slowest_tflops": min(rates)}
    bandwidths = [result["bandwidth_gb_s"] for result in results if "bandwidth_gb_s" in result]
    if bandwidths:
        report["bandwidth_gb_s"] = min(bandwidths)
    return report


def check_products(device: torch.device) -> float:
    """Multiply whole numbers, whose products every format holds exactly; returns TFLOP/s.

    Raises:
        ArithmeticError: a product is wrong, or is another one the next time.
    """
    size = _SIZE[device.type]
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-1, 2, (size, size), generator=generator, dtype=torch.float32) for _ in range(2))
    # rows and columns whose exact sums are cheap: of the products' rows, (A B) 1 = A (B 1)
    expected = a.double() @ (b.double() @ torch.ones(size, dtype=torch.float64))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = a.to(device, dtype), b.to(device, dtype)
    first = left @ right
    if device.type == "cpu" and not torch.equal(first.double().sum(1), expected):
        raise ArithmeticError("a matrix product is wrong")
    _synchronize(device)
    begin = time.perf_counter()
    others = [left @ right for _ in range(_REPEATS)]
    _synchronize(device)
    seconds = time.perf_counter() - begin
    if not all(torch.equal(first, other) for other in others):
        raise ArithmeticError("the same matrix product came out differently")
    if device.type == "cuda":
        exact = (a.to(device) @ b.to(device)).double()  # entries are whole numbers below 2^24: exact in fp32
        if not torch.equal(exact.sum(1).cpu(), expected) or not torch.equal(exact.to(dtype), first):
            raise ArithmeticError("a matrix product is wrong")
    return 2 * size**3 * _REPEATS / seconds / 1e12


def check_memory(device: torch.device) -> float:
    """Fill most of the free memory with a pattern and read it back; returns GiB.

    Raises:
        ArithmeticError: what is read is not what was written.
    """
    chunk = _MEMORY_BYTES[device.type]
    count = 2
    if device.type == "cuda":
        count = int(_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]) // chunk
    pattern = torch.arange(1 << 20, dtype=torch.int32, device=device) * 2654435 % 2147483647
    blocks = []
    for number in range(count):
        block = torch.empty(chunk // 4, dtype=torch.int32, device=device).view(-1, pattern.numel())
        blocks.append(block.copy_(pattern + number))
    for number, block in enumerate(blocks):
        if not bool((block == pattern + number).all()):
            raise ArithmeticError(f"memory: block {number} of {count} does not hold what was written")
    blocks.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return count * chunk / 2**30


def check_all_reduce(device: torch.device, world: World) -> float:
    """Sum over all ranks; returns the bus bandwidth in GB/s, as nccl-tests define it: 2 (n - 1) / n times bytes per
    second.

    Raises:
        ArithmeticError: the sum is wrong.
    """
    size = _REDUCED_BYTES[device.type] // 4
    values = torch.full((size,), float(world.rank + 1), device=device)
    dist.all_reduce(values)
    if not bool((values == world.size * (world.size + 1) / 2).all()):
        raise ArithmeticError("the sum over all ranks is wrong")
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(_REPEATS):
        dist.all_reduce(values)
    _synchronize(device)
    seconds = (time.perf_counter() - begin) / _REPEATS
    return 2 * (world.size - 1) / world.size * size * 4 / seconds / 1e9


def _stages(platform: Platform, world: World, store: Store, mine: dict[str, Any]) -> None:
    def begin(stage: str) -> None:
        store.tell(f"stage/{world.rank}", [stage, node_name()])

    begin(STAGES[0])
    platform.start(world.local_rank)
    device = platform.device
    mine["device"] = device.type
    begin(STAGES[1])
    mine["tflops"] = check_products(device)
    begin(STAGES[2])
    mine["memory_gib"] = check_memory(device)
    store.tell(f"fit/{world.rank}", True)
    begin(STAGES[3])
    _wait_for_all_fit(world, store)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(platform.collectives, timeout=timeout)
    mine["bandwidth_gb_s"] = check_all_reduce(device, world)
    dist.destroy_process_group()
    begin(STAGES[4])


def _wait_for_all_fit(world: World, store: Store) -> None:
    """Do not enter a collective while a rank is not fit for it; those that wait here are not at fault."""
    waiting = set(range(world.size))
    while waiting:
        waiting = {rank for rank in waiting if store.known(f"fit/{rank}") is None}
        unfit = [rank for rank in waiting if store.known(f"result/{rank}") is not None]
        if unfit:
            store.tell(f"stage/{world.rank}", [STAGES[4], node_name()])
            raise _OthersUnfit
        time.sleep(0.05 if world.size <= 64 else 0.5)


def _versions() -> dict[str, str]:
    found = versions() | {"torch": str(torch.__version__)}
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def unanswered(stages: Mapping[int, Any], size: int) -> list[list[str]]:
    """Who keeps the others waiting: ranks without a word, else those at the earliest stage; as `[node, text]`."""
    silent = [rank for rank in range(size) if stages.get(rank) is None]
    if silent:
        return [["", f"ranks {', '.join(map(str, silent[:8]))} gave no answer in {TIMEOUT_S:g} s"]]
    order = {rank: STAGES.index(told[0]) for rank, told in stages.items()}
    late = [rank for rank in range(size) if order[rank] == min(order.values())]
    if len(late) == size:
        return [["", f"all ranks stood at {stages[0][0]} after {TIMEOUT_S:g} s"]]
    return [[stages[rank][1], f"rank {rank} stood at {stages[rank][0]} after {TIMEOUT_S:g} s"] for rank in late]


def _give_up(store: Store, world: World, run_dir: Path | None, start: str) -> None:
    """The time is over: rank 0 names who did not come along, and every rank ends."""
    if world.rank == 0:
        stages = {rank: store.known(f"stage/{rank}") for rank in range(world.size)}
        problems = unanswered(stages, world.size)
        if run_dir is not None:
            write_report(run_dir, start, RANKS, {"problems": problems, "world_size": world.size})
        print("\n".join(f"ling: error: preflight: {' '.join(pair).strip()}" for pair in problems), flush=True)
    os._exit(1)
