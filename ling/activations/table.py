"""The registry of FFN activations: what a row is, how one is added, and what a config value means. Torch-free.

The rows themselves stand beside their math in `gated.py` and `ungated.py`. A file outside the package adds one in the
same way, see docs/adding-an-activation.md.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ling.config.errors import UserError

LEARN = ("per_layer", "global", "fixed")
"""What becomes of the scalars: each layer learns its own, all layers learn the same, or they keep their values."""


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter: what the config sets and training does not change.

    Without a default it must be given. `gt`, `ge`, `lt`, `le` are its limits; `choices` makes it one of these words,
    `integer` a whole number. With `per_layer` a list with one entry per layer is allowed as well. With `can_be_off`, 0
    or null switch it off: the math then sees infinity. `within_width`: it may not exceed the FFN's width. With
    `in_math=False` it is no argument of the math: it only says how many scalars there are.
    """

    name: str
    default: float | str | None
    doc: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    choices: tuple[str, ...] = ()
    integer: bool = False
    per_layer: bool = False
    can_be_off: bool = False
    within_width: bool = False
    in_math: bool = True

    @property
    def required(self) -> bool:
        """Whether the config must give it."""
        return self.default is None and not self.can_be_off

    def limits(self) -> str:
        """The allowed values in words, as in error messages and help: `> 0 and < 10`."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
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
class Learnable:
    """A scalar that training may change, or several under one name; the config may give the initial value.

    `initial` is a number; or a tuple of the first ones, where `length` names the hyper-parameter that counts the
    scalars: the others start at 0.
    """

    name: str
    initial: float | tuple[float, ...]
    doc: str
    length: str | None = None

    def default(self, params: Mapping[str, Any]) -> float | list[float]:
        """The initial value where the config gives none: a number, or a list of the right length."""
        if not isinstance(self.initial, tuple):
            return float(self.initial)
        count = params[self.length] if self.length is not None else len(self.initial)
        return [float(self.initial[i]) if i < len(self.initial) else 0.0 for i in range(count)]


def _no_math(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("this row is not registered")


@dataclass(frozen=True)
class Activation:
    """One row of the registry.

    Args:
        name: what a config calls it; also the name of the function.
        gated: whether the FFN has a gate and an up projection (phi(g, u)) or one projection (phi(x)).
        summary: its formula, or what it does, in one sentence.
        source: paper or model that it comes from.
        hidden_act: its name in a Hugging Face config.json; no other row of the same gatedness has it.
        flops_per_element: forward operations per output element with the default parameters, where a square root,
            logarithm, exponential, error function or division counts as one (a sigmoid as three).
        parameters: hyper-parameters, in the order in which the kernels take them.
        learnable: scalars that training may change, in the order of the tensor `scalars`.
        learn: what becomes of the scalars unless the config says otherwise, see LEARN.
        rowwise: whether an element depends on the others of its token; the math then takes `rows`.
        doubt: what to tell the user about allowed, but doubtful values; None where nothing is doubtful.
        math: the reference, set by `register`.
    """

    name: str
    gated: bool
    summary: str
    source: str
    hidden_act: str
    flops_per_element: int
    parameters: tuple[Parameter, ...] = ()
    learnable: tuple[Learnable, ...] = ()
    learn: str = "per_layer"
    rowwise: bool = False
    doubt: Callable[[ResolvedActivation], str | None] = lambda resolved: None
    math: Callable[..., Any] = field(default=_no_math, repr=False)

    def forward_bytes(self, itemsize: int) -> int:
        """Memory traffic per output element of a fused forward pass: read gate and up (or x), write y."""
        return itemsize * (3 if self.gated else 2)

    def backward_bytes(self, itemsize: int) -> int:
        """Memory traffic per output element of a fused backward pass: also read dy, write dx of x's size."""
        return itemsize * (5 if self.gated else 3)

    def math_source(self) -> str:
        """The function's source from `def` on. It needs no import and no other name than its arguments."""
        lines = textwrap.dedent(inspect.getsource(self.math)).splitlines()
        (function,) = ast.parse("\n".join(lines)).body
        return "\n".join(lines[function.lineno - 1 :]) + "\n"


@dataclass(frozen=True)
class ResolvedActivation:
    """An activation with the values of everything that a config can set.

    Args:
        params: value of each hyper-parameter; `None` is a limit that is off, a list has one entry per layer.
        initial: initial value of each learnable name; a list where the name stands for several scalars.
        learn: see LEARN.
    """

    activation: Activation
    params: dict[str, Any]
    initial: dict[str, float | list[float]] = field(default_factory=dict)
    learn: str = "fixed"

    @property
    def varies_by_layer(self) -> bool:
        """Whether a parameter was given as a list, one entry per layer."""
        return any(isinstance(value, list) for value in self.params.values())

    def for_layer(self, layer: int) -> dict[str, Any]:
        """The hyper-parameters that the math of a 0-based layer takes by name; a limit that is off is infinity."""
        values = {}
        for parameter in self.activation.parameters:
            if parameter.in_math:
                value = self.params[parameter.name]
                value = value[layer] if isinstance(value, list) else value
                values[parameter.name] = math.inf if value is None else value
        return values

    def kernel_params(self, layer: int) -> list[float]:
        """The same as the kernels take them: a list in the row's order, a choice as its index."""
        values = self.for_layer(layer)
        parameters = [parameter for parameter in self.activation.parameters if parameter.in_math]
        return [float(p.choices.index(values[p.name]) if p.choices else values[p.name]) for p in parameters]

    def initial_scalars(self) -> list[float]:
        """The initial values of the tensor `scalars`, in the row's order; empty where the row has none."""
        values = (self.initial[learnable.name] for learnable in self.activation.learnable)
        return [number for value in values for number in (value if isinstance(value, list) else [value])]

    def check_width(self, width: int, where: str) -> None:
        """Raise UserError where a parameter is more than the width of the whole FFN, `width`."""
        for parameter in self.activation.parameters:
            if parameter.within_width and self.params[parameter.name] > width:
                value = self.params[parameter.name]
                raise UserError(f"{where}.{parameter.name}: {value} is more than the FFN's width ({width}); lower it")

    def warnings(self) -> list[str]:
        """What the user should know about allowed, but doubtful values; one line each."""
        line = self.activation.doubt(self)
        return [line] if line else []


ACTIVATIONS: dict[str, Activation] = {}
"""Every registered activation by its name."""

Math = TypeVar("Math", bound=Callable[..., Any])


def register(row: Activation) -> Callable[[Math], Math]:
    """Add a row to the registry, as the decorator of its math.

    The function takes the gate and the up projection (or the one projection) by position, and by name each
    hyper-parameter, `scalars` (a 1-D tensor) where the row has learnable ones, and `rows` where it is row-wise (see
    `ling.activations.reference.WholeRows`). It is pure math on float32 or float64 tensors, of tensor methods alone and
    without imports: the caller widens and rounds, and an export ships the source as it stands.

    Raises:
        UserError: the name is taken, or the function's arguments are not those of the row.
    """

    def add(function: Math) -> Math:
        if row.name in ACTIVATIONS:
            raise UserError(f"activation {row.name!r} is registered already; give the new one another name")
        wanted = _arguments(row)
        positional, named = [], set()
        for argument in inspect.signature(function).parameters.values():
            if argument.kind is argument.KEYWORD_ONLY:
                named.add(argument.name)
            else:
                positional.append(argument.name)
        if len(positional) != (2 if row.gated else 1) or named != set(wanted):
            call = ", ".join([*(["g", "u"] if row.gated else ["x"]), *(["*", *wanted] if wanted else [])])
            raise UserError(f"activation {row.name!r}: its function must take ({call}), as its row says")
        ACTIVATIONS[row.name] = replace(row, math=function)
        return function

    return add


def _arguments(row: Activation) -> list[str]:
    """The names of the arguments that the math takes by name."""
    names = [parameter.name for parameter in row.parameters if parameter.in_math]
    return [*names, *(["scalars"] if row.learnable else []), *(["rows"] if row.rowwise else [])]


def resolve(
    spec: str | Mapping[str, Any], where: str = "model.activation", num_layers: int | None = None
) -> ResolvedActivation:
    """The activation that a config value names, with defaults filled in.

    Args:
        spec: a name, or a mapping with `name` and settings, such as `{name: powlu, m: 3.0}`: hyper-parameters, initial
            values of learnable scalars, and `learn` for what becomes of those.
        where: the config key, for error messages.
        num_layers: length that per-layer lists must have; None: any.

    Raises:
        UserError: unknown name or setting, wrong type, a value out of its range or missing, a list of the wrong length.
    """
    if isinstance(spec, str):
        name, given = spec, {}
    elif isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        name, given = spec["name"], {str(key): spec[key] for key in spec if key != "name"}
    else:
        raise UserError(f"{where}: expected a name, or {{name: powlu, m: 3.0}}, not {spec!r}")
    row = find(name, where)
    known = [parameter.name for parameter in row.parameters]
    known += [*(learnable.name for learnable in row.learnable), "learn"] if row.learnable else []
    for key in given:
        if key not in known:
            raise UserError(f"{where}: {name} has no parameter {key!r}{_did_you_mean(key, known)}")
    params = {entry.name: _parameter(entry, given, where, num_layers) for entry in row.parameters}
    initial = {entry.name: _initial(entry, given, where, params) for entry in row.learnable}
    learn = given.get("learn", row.learn)
    if learn not in LEARN:
        raise UserError(f"{where}.learn: must be one of {', '.join(LEARN)}, not {learn!r}")
    return ResolvedActivation(row, params, initial, learn if row.learnable else "fixed")


def find(name: str, where: str = "") -> Activation:
    """The row of a name; UserError, with the nearest name, where there is none."""
    if name not in ACTIVATIONS:
        prefix = f"{where}: " if where else ""
        raise UserError(f"{prefix}unknown activation {name!r}{_did_you_mean(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _parameter(parameter: Parameter, given: Mapping[str, Any], where: str, num_layers: int | None) -> Any:
    """The value of a hyper-parameter (None: off); UserError where it does not fit."""
    where = f"{where}.{parameter.name}"
    if parameter.name not in given:
        if parameter.required:
            raise UserError(f"{where}: not given; it has no default: {parameter.doc}")
        return parameter.default
    value = given[parameter.name]
    if not isinstance(value, Sequence) or isinstance(value, str):
        return _one(parameter, value, where)
    if not parameter.per_layer:
        raise UserError(f"{where}: expected one value, not a list; it is the same in all layers")
    if num_layers is not None and len(value) != num_layers:
        raise UserError(f"{where}: {len(value)} entries for {num_layers} layers; give one per layer, or one number")
    return [_one(parameter, entry, f"{where}[{layer}]") for layer, entry in enumerate(value)]


def _one(parameter: Parameter, value: Any, where: str) -> float | str | None:
    if value is None and parameter.can_be_off:
        return None
    if parameter.choices:
        if value not in parameter.choices:
            raise UserError(f"{where}: must be {parameter.limits()}, not {value!r}")
        return value
    if not _is_number(value) or (parameter.integer and value != int(value)):
        kinds = "a whole number" if parameter.integer else "a number"
        raise UserError(
            f"{where}: expected {kinds}{' or a list with one per layer' * parameter.per_layer}, not {value!r}"
        )
    if not parameter.admits(value):
        raise UserError(f"{where}: must be {parameter.limits()}, not {value!r}")
    if parameter.can_be_off and value == 0:
        return None
    return int(value) if parameter.integer else float(value)


def _initial(
    learnable: Learnable, given: Mapping[str, Any], where: str, params: Mapping[str, Any]
) -> float | list[float]:
    """The initial value of a learnable name; UserError where it does not fit."""
    default = learnable.default(params)
    if learnable.name not in given:
        return default
    value, where = given[learnable.name], f"{where}.{learnable.name}"
    if not isinstance(default, list):
        if not _is_number(value):
            raise UserError(f"{where}: expected a number, the initial value, not {value!r}")
        return float(value)
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(numbers) != len(default) or not all(_is_number(number) for number in numbers):
        count = f"{learnable.length} = {len(default)}"
        raise UserError(f"{where}: expected a list of {count} numbers, the initial values, not {value!r}")
    return [float(number) for number in numbers]


def _is_number(value: Any) -> bool:
    # bool is an int to Python, but not to a person
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _did_you_mean(word: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    if not names:
        return "; it has none"
    close = difflib.get_close_matches(word, names, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" There is: {', '.join(names)}"
