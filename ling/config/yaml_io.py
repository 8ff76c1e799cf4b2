"""Reading and writing the YAML of configs: YAML 1.2's plain scalars, no duplicate keys, errors with file and line."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ling.config.errors import UserError

_FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9_]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"
)

# PyYAML speaks YAML 1.1, where `2e-3` is text, `on` is a boolean and `1:30` is a number: these are YAML 1.2's rules.
_SCALARS: list[tuple[str, re.Pattern[str], str]] = [
    ("null", re.compile(r"(~|null|Null|NULL|)$"), "~nN\0"),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"([-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("float", re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"), "-+."),
    ("merge", re.compile(r"<<$"), "<"),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
            if key in seen:
                problem = f"the key {key!r} is given twice (first in line {seen[key]})"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Also quotes the texts that only our loader would read as numbers."""

    yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    _firsts = ["" if character == "\0" else character for character in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _firsts)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _problem(error: yaml.YAMLError) -> tuple[int | None, str]:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return (mark.line + 1 if mark else None), " ".join(str(text).split())


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; `where` names it in errors."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        line, problem = _problem(error)
        place = where if line is None else f"{where}, line {line}"
        raise UserError(f"{place}: not valid YAML: {problem}; mend the file or quote the text") from None


def read_yaml(path: Path, named_by: str = "") -> dict[str, Any]:
    """The mapping in a YAML file; `named_by` says who asked for the file."""
    suffix = f" (named by {named_by})" if named_by else ""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file{suffix}; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8{suffix}; give a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read{suffix}: {error.strerror}; give a readable YAML file") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {type(values).__name__} {values!r:.40} at its root"
        raise UserError(f"{path}: {found}; a config is a mapping such as `model: {{num_layers: 4}}`")
    return values


def dump_yaml(value: Any) -> str:
    """YAML text of plain values, in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
