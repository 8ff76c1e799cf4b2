"""From a YAML file, the files that it is based on, and dotted overrides to one typed config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ling.config.errors import UserError
from ling.config.keys import ACTIVATION_KEYS, Key, all_keys, branches, did_you_mean, limit_problems, normal_activation
from ling.config.schema import Config
from ling.config.yaml_io import parse_yaml, read_yaml


@dataclass(frozen=True)
class _Layer:
    """The values of one file or of one override, and the name of their origin for errors."""

    origin: str
    values: dict[str, Any]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with its bases and `a.b=c` overrides; later layers win.

    Checks keys, types and each key's own limits; the rules between keys are `check_config`'s. Raises UserError.
    """
    layers = [*_file_layers(Path(path)), *(_override_layer(text) for text in overrides)]
    merged: dict[str, Any] = {"model": {"activation": all_keys()["model.activation"].default}}
    origins: dict[str, str] = {}
    for layer in layers:
        _check_keys(layer)
        _check_types(layer)
        merged = _merge(merged, layer.values)
        origins |= {f"{branch}.{key}": layer.origin for branch in layer.values for key in layer.values[branch]}
    config = _build(merged, str(path))
    problems = list(limit_problems(config, origins))
    if problems:
        raise UserError(summary(problems))
    return config


def from_dict(values: dict[str, Any], where: str) -> Config:
    """The config of a resolved tree as `to_dict` gives it, such as a checkpoint's. Raises UserError naming `where`."""
    layer = _Layer(where, values)
    _check_keys(layer)
    _check_types(layer)
    return _build(values, where)


def summary(problems: Sequence[str]) -> str:
    """The first problem, and how many more there are."""
    more = len(problems) - 1
    return problems[0] + (f" (and {more} more)" if more else "")


def _file_layers(path: Path, chain: tuple[Path, ...] = ()) -> Iterator[_Layer]:
    files = [link.resolve() for link in chain]
    if path.resolve() in files:
        circle = " -> ".join(link.name for link in (*chain[files.index(path.resolve()) :], path))
        raise UserError(f"{chain[-1]}: base: the files are based on each other in a circle: {circle}; remove one link")
    values = read_yaml(path, named_by=f"base in {chain[-1]}" if chain else "")
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: base: expected a file or a list of files, got {bases!r}; write base: [model.yaml]")
    for base in bases:
        yield from _file_layers(path.parent / base, (*chain, path))
    yield _Layer(str(path), values)


def _override_layer(text: str) -> _Layer:
    origin = f"override {text!r}"
    name, equals, raw = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts) or not raw.strip():
        raise UserError(f"{origin}: not of the form a.b=c; write for example optim.lr=1e-3 (and a.b=null for none)")
    value = parse_yaml(raw, origin)
    key = all_keys().get(".".join(parts))
    if key is not None and key.type_name in ("text", "text or null") and isinstance(value, (bool, int, float)):
        value = raw.strip()  # a run may be named 007
    for part in reversed(parts):
        value = {part: value}
    return _Layer(origin, value)


def _check_keys(layer: _Layer) -> None:
    """Only known keys, and a mapping under each branch."""
    for branch, values in layer.values.items():
        if branch not in branches():
            hint = did_you_mean(branch, branches()) or did_you_mean(branch, all_keys())
            allowed = ", ".join(branches())
            raise UserError(f"{layer.origin}: unknown key {branch}{hint or f'; the branches are {allowed}'}")
        if not isinstance(values, dict):
            raise UserError(
                f"{layer.origin}: {branch}: expected a mapping of settings, got {_shown(values)}; "
                f"write {branch}: {{key: value}}, or leave it out"
            )
        for key in values:
            name = f"{branch}.{key}"
            if name not in all_keys():
                hint = did_you_mean(name, all_keys())
                raise UserError(f"{layer.origin}: unknown key {name}{hint or f'; see `ling config keys {branch}`'}")


@cache
def _schema() -> Any:
    return OmegaConf.structured(Config)


def _check_types(layer: _Layer) -> None:
    try:
        OmegaConf.merge(_schema(), layer.values)
    except OmegaConfBaseException as error:
        name = ".".join((error.full_key or "").split(".")[:2]).split("[")[0]
        key = all_keys().get(name)
        if key is None:
            raise UserError(f"{layer.origin}: {_first_line(error)}") from None
        raise UserError(f"{layer.origin}: {_wrong_type(key, layer)}") from None


def _wrong_type(key: Key, layer: _Layer) -> str:
    branch, leaf = key.name.split(".")
    value = layer.values[branch][leaf]
    choices = f" ({', '.join(key.limits['choices'])})" if "choices" in key.limits else ""
    return f"{key.name}: expected {key.type_name}{choices}, got {_shown(value)}; mend the value"


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r:.60} ({type(value).__name__})"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _merge(old: dict[str, Any], new: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """`new` over `old`: mappings merge, everything else is replaced; so is an activation of another name."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        is_activation = path == ("model",) and key in ACTIVATION_KEYS
        if isinstance(before, dict) and isinstance(value, dict) and not (is_activation and _renamed(before, value)):
            value = _merge(before, value, (*path, key))
        merged[key] = normal_activation(value) if is_activation else value
    return merged


def _renamed(before: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether this is another activation, into which the parameters of the one before must not leak."""
    return value.get("name", before.get("name")) != before.get("name")


def _build(values: dict[str, Any], origin: str) -> Config:
    try:
        tree = OmegaConf.merge(_schema(), values)
        missing = sorted(OmegaConf.missing_keys(tree), key=list(all_keys()).index)
        if missing:
            raise UserError(f"{origin}: not given and without default: {', '.join(missing)}; set them in the file")
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {error.full_key}: {_first_line(error)}") from None
    assert isinstance(config, Config)
    return config
