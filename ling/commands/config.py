"""Show a resolved config, check that it can run, or list the keys that a config may have."""

from __future__ import annotations

import argparse
import json
import sys

from ling.commands import add_config_arguments, positive_int
from ling.config import Config, check_config, load_config, non_default_values, to_dict, to_yaml
from ling.config.derived import data_parallel_size, global_batch_size_at, num_microbatches
from ling.config.report import describe_keys, shown
from ling.config.rules import config_warnings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ling config`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{show,check,keys}")
    show = actions.add_parser("show", help="print the resolved tree, and what differs from the defaults")
    check = actions.add_parser("check", help="check everything that can be checked before ranks are started")
    for action in (show, check):
        add_config_arguments(action)
    show.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--world", type=positive_int, metavar="N", help="check the layout for so many ranks, too")
    keys = actions.add_parser("keys", help="list every key with its type, default and meaning")
    keys.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help="only the keys under it, such as `optim`")


def run(args: argparse.Namespace) -> int:
    """Run `ling config`."""
    if args.action == "keys":
        print(describe_keys(args.prefix))
        return 0
    config = load_config(args.config, args.overrides)
    if args.action == "show":
        print(_as_json(config) if args.json else _as_text(config))
    else:
        check_config(config, args.world)
        for line in config_warnings(config):
            print(f"ling: warning: {line}", file=sys.stderr)
        print(f"{args.config}: ok, {_checked(config, args.world)}")
    return 0


def _as_text(config: Config) -> str:
    changed = non_default_values(config)
    width = max((len(name) for name, _, _ in changed), default=0)
    lines = [
        f"#   {name:<{width}}  {shown(value)}" + ("" if default == "???" else f"  (default {shown(default)})")
        for name, value, default in changed
    ]
    return "\n".join([to_yaml(config), f"# {len(changed)} settings differ from the defaults or have none:", *lines])


def _as_json(config: Config) -> str:
    changed = {name: {"value": value, "default": default} for name, value, default in non_default_values(config)}
    return json.dumps({"config": to_dict(config), "non_default": changed}, indent=2, ensure_ascii=False)


def _checked(config: Config, world_size: int | None) -> str:
    """The checks that need megatron-core, and the model and layout in words."""
    from ling.commands.export import check_exports_of
    from ling.model.build import check_model_config
    from ling.model.counts import count_parameters

    check_model_config(config)
    check_exports_of(config, whole=False)
    counts = count_parameters(config.model)
    text = f"{counts.total:,} parameters ({counts.activated:,} activated per token)"
    if world_size is not None:
        replicas = data_parallel_size(config.parallel, world_size)
        sizes = dict.fromkeys((global_batch_size_at(config, 0), config.train.global_batch_size))
        batches = " to ".join(str(num_microbatches(config, world_size, size)) for size in sizes)
        text += f"; {world_size} ranks: {replicas} data-parallel, {batches} microbatches per step"
    return text
