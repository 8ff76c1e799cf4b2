"""The dotted keys of a config, with their types, defaults and limits, as one flat table."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

from ling.config.schema import MISSING, Config

ACTIVATION_KEYS = ("activation", "dense_activation", "shared_activation", "routed_activation")
LARGEST_INT = 2**31 - 1
_TYPE_NAMES: dict[Any, str] = {int: "int", float: "float", bool: "true or false", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Key:
    """One setting: its dotted name, type, default (activations in their normal form), description and limits."""

    name: str
    type: Any
    default: Any
    doc: str
    limits: Mapping[str, Any]

    @property
    def type_name(self) -> str:
        """The type in a user's words, such as `int or null`."""
        return " or ".join(_type_name(member) for member in _members(self.type))


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is list:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "mapping"
    return _TYPE_NAMES.get(hint, "text, list or mapping")


def normal_activation(value: Any) -> Any:
    """An activation in its normal form: `{name: ..., **parameters}`; null stays null."""
    return {"name": value} if isinstance(value, str) and value != MISSING else value


def _default(field: dataclasses.Field[Any]) -> Any:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return normal_activation(default) if field.name in ACTIVATION_KEYS else default


@cache
def branches() -> dict[str, type]:
    """The branches of a config (`run`, `model`, ...) and their dataclasses."""
    return typing.get_type_hints(Config)


@cache
def all_keys() -> dict[str, Key]:
    """Every setting by its dotted name, in the order of the schema."""
    table = {}
    for branch, cls in branches().items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            name = f"{branch}.{field.name}"
            limits = {limit: value for limit, value in field.metadata.items() if limit != "doc"}
            table[name] = Key(name, hints[field.name], _default(field), field.metadata["doc"], limits)
    return table


def get_value(config: Config, name: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, name.split("."), config)


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """`; did you mean X?`, or nothing where no known word is near."""
    known = list(known)
    last = word.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == last]
    near = same_leaf or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(last, leaves, n=1, cutoff=0.75)]
    return f"; did you mean {near[0]}?" if near else ""


def limit_problems(config: Config, origins: Mapping[str, str] | None = None) -> Iterator[str]:
    """What breaks a single key's own limits; `origins` says where each value came from."""
    for key in all_keys().values():
        value = get_value(config, key.name)
        where = key.name + (f" ({origins[key.name]})" if origins and key.name in origins else "")
        if isinstance(value, str) and value == MISSING:
            yield f"{where}: not given; it has no default: set {key.name}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{where}: must be a finite number, got {value}"
        elif isinstance(value, int) and abs(value) > LARGEST_INT:
            yield f"{where}: {value} is larger than {LARGEST_INT}, the largest number allowed"
        elif value is not None:
            yield from _outside(where, value, key.limits)


def _outside(where: str, value: Any, limits: Mapping[str, Any]) -> Iterator[str]:
    inside = {
        "ge": (lambda limit: value >= limit, "at least"),
        "gt": (lambda limit: value > limit, "greater than"),
        "le": (lambda limit: value <= limit, "at most"),
        "lt": (lambda limit: value < limit, "less than"),
    }
    for kind, limit in limits.items():
        if kind == "choices" and value not in limit:
            yield f"{where}: {value!r} is not one of {', '.join(limit)}{did_you_mean(str(value), limit)}"
        elif kind in inside and not inside[kind][0](limit):
            yield f"{where}: must be {inside[kind][1]} {limit}, got {value}"
