"""Predict memory, time, cost and checkpoints of a run, and find or verify its layout, without a GPU."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from ling.commands import add_config_arguments, positive_int
from ling.config import Config, UserError, load_config
from ling.config.schema import RuntimeConfig
from ling.plan.cluster import Cluster, load_cluster
from ling.plan.plan import IMBALANCE, Plan, as_dict, checked, make_plan
from ling.plan.search import Found, search
from ling.plan.text import big, columns, duration, render

TOP = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ling plan`."""
    add_config_arguments(parser)
    parser.add_argument("--cluster", metavar="FILE", help="cluster file (default: nodes of eight H100)")
    parser.add_argument("--world", type=positive_int, metavar="N", help="ranks (default: one node)")
    parser.add_argument(
        "--imbalance",
        type=_imbalance,
        default=IMBALANCE,
        metavar="X",
        help=f"rows of the rank whose experts get the most, over the mean (default {IMBALANCE})",
    )
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit")
    parser.add_argument("--verify", action="store_true", help="build every distinct rank without memory, and compare")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Plan; 0 where the plan fits and holds, 1 where it does not, 2 where the settings are wrong."""
    config = load_config(args.config, args.overrides)
    cluster = load_cluster(args.cluster) if args.cluster else Cluster()
    world = args.world or cluster.node.gpus
    if args.search and args.verify:
        raise UserError("--search and --verify: give one of them; verify the layout that the search has found")
    if args.search:
        return _search(config, cluster, world, args)
    if args.verify:
        return _verify(config, world, args.json)
    plan = make_plan(config, cluster, world, imbalance=args.imbalance)
    print(json.dumps(as_dict(plan), indent=2) if args.json else render(plan))
    return 0 if plan.fits else 1


def _imbalance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return value


def _search(config: Config, cluster: Cluster, world: int, args: argparse.Namespace) -> int:
    found = search(config, cluster, world, imbalance=args.imbalance)
    if args.json:
        print(json.dumps([{"settings": list(row.settings), **as_dict(row.plan)} for row in found[:TOP]], indent=2))
        return 0 if found else 1
    if not found:
        print(f"no layout of {world} ranks fits {cluster.gpu.memory_gib:g} GiB: try more ranks, or larger GPUs")
        return 1
    rows: list[tuple[str, ...]] = [
        ("", "layout", "micro-batch", "recomputed", "needs GiB", "step", "tokens/s per GPU", "MFU")
    ]
    rows += [_row(number, row) for number, row in enumerate(found[:TOP], start=1)]
    print("\n".join(columns(rows)))
    print(f"\n{len(found)} layouts of {world} ranks fit. The first, as settings:\n  " + " ".join(found[0].settings))
    return 0


def _row(number: int, found: Found) -> tuple[str, ...]:
    plan: Plan = found.plan
    runtime = plan.config.runtime
    per_device = plan.tokens_per_s / plan.layout.world
    needs = max(memory.needed for memory in plan.memory) / 2**30
    recomputed = "+".join(runtime.recompute_modules) or runtime.recompute_granularity
    balanced = " (uneven stages)" if plan.config.parallel.num_layers_per_stage else ""
    return (
        f"{number}",
        plan.layout.describe() + balanced,
        f"{plan.config.train.micro_batch_size}",
        recomputed,
        f"{needs:.1f}",
        duration(plan.step.total),
        f"{per_device:,.0f}",
        f"{plan.mfu:.1%}",
    )


def _verify(config: Config, world: int, as_json: bool) -> int:
    for note in checked(config, world):
        print(f"ling: warning: {note}", file=sys.stderr)
    from ling.platform import get_platform
    from ling.platform.select import choose

    # Shapes are those of the torch backend, on a machine of any kind.
    runtime = RuntimeConfig(platform="cpu", backend="torch", attention="sdpa", kernels="reference")
    if config.precision.recipe.startswith("fp8"):
        config.precision.recipe = "bf16"
    platform = get_platform("cpu")
    platform.start(0)
    operations = {name: choice.implementation for name, choice in choose(runtime, "cpu").items()}
    from ling.plan.verify import verify

    result = verify(config, world, operations)
    if as_json:
        print(json.dumps(_as_dict(result), indent=2))
    else:
        print(_as_text(result))
    return 1 if result.problems else 0


def _as_dict(result: Any) -> dict[str, Any]:
    rows = [
        {
            "stage": row.kind.stage.index,
            "ranks": [row.kind.ranks[0], row.kind.ranks[-1]],
            "parameters": row.parameters,
            "expected_parameters": row.expected_parameters,
            "activation_bytes": row.activations,
            "expected_activation_bytes": row.expected_activations,
            "problems": row.problems,
        }
        for row in result.ranks
    ]
    return {"world": result.world, "routing": "uniform", "seconds": result.seconds, "built": rows}


def _as_text(result: Any) -> str:
    rows = [("ranks", "layers", "parameters", "planned", "saved activations", "planned")]
    for row in result.ranks:
        first, last = row.kind.ranks[0], row.kind.ranks[-1]
        layers = " ".join(f"{chunk.layers[0]}-{chunk.layers[-1]}" for chunk in row.kind.stage.chunks)
        saved, planned = (f"{size / 2**30:.2f} GiB" for size in (row.activations, row.expected_activations))
        parameters, expected = f"{row.parameters:,}", f"{row.expected_parameters:,}"
        rows.append((f"{first}-{last}" if first != last else f"{first}", layers, parameters, expected, saved, planned))
    kinds = len(result.ranks)
    lines = [
        f"built {kinds} rank{'' if kinds == 1 else 's'}, all that are distinct of {result.world}, on the meta device, "
        f"and ran the shapes of one forward pass of one micro-batch, in {duration(result.seconds)}",
        "routing is assumed uniform (all experts get as many tokens); linear layers are the torch backend's",
        "",
        *columns(rows),
        "",
        *(result.problems or [f"every parameter has the planned name and shape; {big(_total(result))} on these ranks"]),
    ]
    return "\n".join(lines)


def _total(result: Any) -> int:
    return sum(row.parameters for row in result.ranks)
