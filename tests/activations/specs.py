"""A spec of every activation, for tests that go through the registry; those of no default get a value for 24 units."""

from typing import Any

from ling.activations.table import ACTIVATIONS, ResolvedActivation, resolve

WIDTH = 24
GIVEN: dict[str, dict[str, Any]] = {"topk_relu": {"k": 5}}
NAMES = sorted(ACTIVATIONS)


def spec(name: str, **settings: Any) -> dict[str, Any]:
    """A config value for this activation."""
    return {"name": name, **GIVEN.get(name, {}), **settings}


def resolved(name: str, **settings: Any) -> ResolvedActivation:
    return resolve(spec(name, **settings))
