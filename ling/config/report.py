"""A config as text: the whole tree, what differs from the defaults or from another config, and the list of keys."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ling.config.errors import UserError
from ling.config.keys import all_keys, branches, did_you_mean, get_value
from ling.config.schema import MISSING, Config
from ling.config.yaml_io import dump_yaml


def to_dict(config: Config) -> dict[str, Any]:
    """The tree as plain dictionaries, in the order of the schema."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved tree as YAML; `load_config` of it gives an equal config."""
    return dump_yaml(to_dict(config))


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved tree as a YAML file."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def non_default_values(config: Config) -> list[tuple[str, Any, Any]]:
    """`(key, value, default)` of every setting that differs from its default; a missing default is `???`."""
    pairs = ((key.name, get_value(config, key.name), key.default) for key in all_keys().values())
    return [(name, value, default) for name, value, default in pairs if value != default]


def diff(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """`(key, value in a, value in b)` of every setting in which two configs differ."""
    pairs = ((name, get_value(a, name), get_value(b, name)) for name in all_keys())
    return [(name, left, right) for name, left, right in pairs if left != right]


def shown(value: Any) -> str:
    """A value as it would be written in a config."""
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) or value == "" else value


def describe_keys(prefix: str = "") -> str:
    """Every key (under a dotted prefix) with its type, default, limits and one-line description."""
    keys = [key for key in all_keys().values() if not prefix or f"{key.name}.".startswith(f"{prefix}.")]
    if not keys:
        known = [*branches(), *all_keys()]
        raise UserError(
            f"no key starts with {prefix}{did_you_mean(prefix, known) or f'; try {next(iter(branches()))}'}"
        )
    lines = []
    for key in keys:
        default = "required" if key.default == MISSING else f"default {shown(key.default)}"
        facts = [key.type_name, default, *_limit_texts(key.limits)]
        lines.append(f"{key.name}  ({'; '.join(facts)})\n    {key.doc}")
    return "\n".join(lines)


def _limit_texts(limits: Any) -> list[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    texts = [f"{signs[kind]} {limit}" for kind, limit in limits.items() if kind in signs]
    return texts + (["one of " + ", ".join(limits["choices"])] if "choices" in limits else [])
