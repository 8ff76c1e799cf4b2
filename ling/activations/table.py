"""The registry of FFN activations: names, parameters, limits. Torch-free.

A row here and a function of the same name in `reference.py` make an activation; nothing else has to know it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ling.config.errors import UserError

POWLU_PAPER = "PowLU: An Activation Function for Stable Pre-Training of LLMs, arXiv 2605.25704"
GLU_PAPER = "GLU Variants Improve Transformer, arXiv 2002.05202"


@dataclass(frozen=True)
class Parameter:
    """A number that an activation takes from the config.

    `gt`, `ge`, `lt`, `le` are its limits. With `per_layer` a list with one entry per layer is allowed as well. With
    `can_be_off`, 0 or null switch the parameter off: the math then sees infinity. A value below `warn_below` is
    allowed, but `warning` is worth telling.
    """

    name: str
    default: float
    doc: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    per_layer: bool = False
    can_be_off: bool = False
    warn_below: float | None = None
    warning: str = ""

    def limits(self) -> str:
        """The allowed range in words, as it is in error messages and help: `> 0 and < 10`."""
        bounds = ((">", self.gt), (">=", self.ge), ("<", self.lt), ("<=", self.le))
        text = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        return f"{text}; 0 or null: off" if self.can_be_off else text

    def admits(self, number: float) -> bool:
        """Whether a finite number is within the limits."""
        return (
            (self.gt is None or number > self.gt)
            and (self.ge is None or number >= self.ge)
            and (self.lt is None or number < self.lt)
            and (self.le is None or number <= self.le)
        )


@dataclass(frozen=True)
class Activation:
    """One row of the registry.

    Args:
        gated: whether the FFN has a gate and an up projection (phi(g, u)) or one projection (phi(x)).
        hidden_act: its name in a Hugging Face config.json.
        flops_per_element: forward operations per output element, where a square root, logarithm, exponential or
            division counts as one (a sigmoid as three).
    """

    name: str
    gated: bool
    summary: str
    source: str
    hidden_act: str
    flops_per_element: int
    parameters: tuple[Parameter, ...] = ()


_ROWS = (
    Activation(
        name="powlu",
        gated=True,
        summary="f(g)*u with f(x) = x^(m/(sqrt(x)+1)) * sigmoid(x) for x > 0, SiLU(x) else: tends to u, not to g*u",
        source=f"{POWLU_PAPER} (two-input form)",
        hidden_act="powlu",
        flops_per_element=11,
        parameters=(
            Parameter(
                "m",
                3.0,
                "strength of the power; the peak of f grows with it",
                gt=0,
                lt=10,
                warn_below=1.0,
                warning="for m < 1 the slope at 0 is infinite from the right",
            ),
        ),
    ),
    Activation(
        name="swiglu",
        gated=True,
        summary="SiLU(g)*u",
        source=GLU_PAPER,
        hidden_act="silu",
        flops_per_element=5,
    ),
    Activation(
        name="swiglu_clip",
        gated=True,
        summary="g' * sigmoid(alpha*g') * (u' + beta) with g' = min(g, limit), u' = clip(u, -limit, limit)",
        source="gpt-oss (limit 7, alpha 1.702, beta 1), arXiv 2508.10925; clamp before the SiLU",
        hidden_act="swiglu_clip",
        flops_per_element=10,
        parameters=(
            Parameter("limit", 7.0, "largest gate, and largest size of up", ge=0, per_layer=True, can_be_off=True),
            Parameter("alpha", 1.0, "slope inside the sigmoid", gt=0),
            Parameter("beta", 0.0, "added to the clipped up"),
        ),
    ),
    Activation(
        name="gelu",
        gated=False,
        summary="x * Phi(x), exact (erf, not tanh)",
        source="Gaussian Error Linear Units, arXiv 1606.08415",
        hidden_act="gelu",
        flops_per_element=5,
    ),
    Activation(
        name="relu2",
        gated=False,
        summary="max(0, x)^2",
        source="Primer: Searching for Efficient Transformers for Language Modeling, arXiv 2109.08668",
        hidden_act="relu2",
        flops_per_element=2,
    ),
)

ACTIVATIONS: dict[str, Activation] = {row.name: row for row in _ROWS}


@dataclass(frozen=True)
class ResolvedActivation:
    """An activation with the values of all its parameters; `None` is a limit that is off."""

    activation: Activation
    params: dict[str, float | None | list[float | None]]

    @property
    def varies_by_layer(self) -> bool:
        """Whether a parameter was given as a list, one entry per layer."""
        return any(isinstance(value, list) for value in self.params.values())

    def for_layer(self, layer: int) -> dict[str, float]:
        """The scalars that the math of a 0-based layer takes; a limit that is off is infinity."""
        chosen = {name: value[layer] if isinstance(value, list) else value for name, value in self.params.items()}
        return {name: math.inf if value is None else value for name, value in chosen.items()}

    def warnings(self) -> list[str]:
        """What the user should know about allowed, but doubtful values; one line each."""
        lines = []
        for parameter in self.activation.parameters:
            value = self.params[parameter.name]
            numbers = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
            if parameter.warn_below is not None and any(number < parameter.warn_below for number in numbers):
                lines.append(f"{self.activation.name}.{parameter.name} = {value}: {parameter.warning}")
        return lines


def resolve(
    spec: str | Mapping[str, Any], where: str = "model.activation", num_layers: int | None = None
) -> ResolvedActivation:
    """The activation that a config value names, with defaults filled in.

    Args:
        spec: a name, or a mapping with `name` and parameters, such as `{name: powlu, m: 3.0}`.
        where: the config key, for error messages.
        num_layers: length that per-layer lists must have; None: any.

    Raises:
        UserError: unknown name or parameter, wrong type, a value out of its range, a list of the wrong length.
    """
    if isinstance(spec, str):
        name, given = spec, {}
    elif isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        name, given = spec["name"], {str(key): spec[key] for key in spec if key != "name"}
    else:
        raise UserError(f"{where}: expected a name, or {{name: powlu, m: 3.0}}, not {spec!r}")
    if name not in ACTIVATIONS:
        raise UserError(f"{where}: unknown activation {name!r}{_did_you_mean(name, ACTIVATIONS)}")
    activation = ACTIVATIONS[name]
    known = {parameter.name: parameter for parameter in activation.parameters}
    for key in given:
        if key not in known:
            raise UserError(f"{where}: {name} has no parameter {key!r}{_did_you_mean(key, known)}")
    params = {
        key: _checked(parameter, given[key], f"{where}.{key}", num_layers) if key in given else parameter.default
        for key, parameter in known.items()
    }
    return ResolvedActivation(activation, params)


def _checked(parameter: Parameter, value: Any, where: str, num_layers: int | None) -> float | None | list[float | None]:
    """The value as floats (None: off); UserError where it does not fit the parameter."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return _checked_number(parameter, value, where)
    if not parameter.per_layer:
        raise UserError(f"{where}: expected one number, not a list; it is the same in all layers")
    if num_layers is not None and len(value) != num_layers:
        raise UserError(f"{where}: {len(value)} entries for {num_layers} layers; give one per layer, or one number")
    return [_checked_number(parameter, entry, f"{where}[{layer}]") for layer, entry in enumerate(value)]


def _checked_number(parameter: Parameter, value: Any, where: str) -> float | None:
    if value is None and parameter.can_be_off:
        return None
    # bool is an int to Python, but not to a person
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        kinds = "a number or a list with one per layer" if parameter.per_layer else "a number"
        raise UserError(f"{where}: expected {kinds}, not {value!r}")
    if not parameter.admits(value):
        raise UserError(f"{where}: must be {parameter.limits()}, not {value!r}")
    return None if parameter.can_be_off and value == 0 else float(value)


def _did_you_mean(word: str, names: Mapping[str, Any]) -> str:
    if not names:
        return "; it has none"
    close = difflib.get_close_matches(word, names, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" There is: {', '.join(names)}"
