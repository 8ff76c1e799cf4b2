"""List the activations, show everything about some of them, or plot them beside SwiGLU.

The list and the texts need no torch; a plot needs torch and matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ling.activations import ACTIVATIONS, Activation, ResolvedActivation, find, resolve
from ling.config import UserError
from ling.config.plugins import load_plugins
from ling.config.yaml_io import parse_yaml
from ling.observe.console import table

if TYPE_CHECKING:
    from torch import Tensor

PLOTTED = (-10.0, 20.0, 1201)  # first and last gate, and points


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling activations`."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="an activation, and its settings after it, such as `powlu m=2`"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw value and derivative, as .png, .pdf or .svg")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE", help="a file that registers more, as run.plugins"
    )


def run(args: argparse.Namespace) -> int:
    """Run `ling activations`."""
    load_plugins(args.plugin)
    chosen = _chosen(args.names)
    if args.plot is not None:
        if not chosen:
            raise UserError("--plot: name what to draw, such as `ling activations powlu --plot powlu.png`")
        _plot({_label(*one): resolve({"name": one[0], **one[1]}, one[0]) for one in chosen}, args.plot)
        print(f"wrote {args.plot}")
        return 0
    for name, settings in chosen:
        if settings:
            resolve({"name": name, **settings}, name)
    if args.json:
        rows = [ACTIVATIONS[name] for name, _ in chosen] or list(ACTIVATIONS.values())
        print(json.dumps([_as_data(row) for row in rows], indent=2, ensure_ascii=False))
    elif chosen:
        print("\n\n".join(_as_text(ACTIVATIONS[name], settings) for name, settings in chosen))
    else:
        print("\n".join(_list()))
    return 0


def _chosen(words: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Names with the settings that follow each of them."""
    chosen: list[tuple[str, dict[str, Any]]] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            chosen.append((find(word).name, {}))
        elif not chosen:
            raise UserError(f"{word}: a setting of which activation? Write it after the name: powlu m=2")
        else:
            chosen[-1][1][key] = parse_yaml(value, word)
    return chosen


def _list() -> list[str]:
    header = ("name", "gated", "parameters", "learnable", "hidden_act", "summary")
    rows = [
        (
            row.name,
            "yes" if row.gated else "no",
            " ".join(f"{p.name}={'?' if p.required else _shown(p.default)}" for p in row.parameters) or "-",
            " ".join(entry.name for entry in row.learnable) or "-",
            row.hidden_act,
            row.summary,
        )
        for row in ACTIVATIONS.values()
    ]
    return table([header, *rows])


def _as_data(row: Activation) -> dict[str, Any]:
    return {
        "name": row.name,
        "gated": row.gated,
        "summary": row.summary,
        "source": row.source,
        "hidden_act": row.hidden_act,
        "rowwise": row.rowwise,
        "flops_per_element": row.flops_per_element,
        "parameters": [
            {"name": entry.name, "default": entry.default, "allowed": entry.limits(), "doc": entry.doc}
            for entry in row.parameters
        ],
        "learnable": [{"name": entry.name, "initial": entry.initial, "doc": entry.doc} for entry in row.learnable],
        "learn": row.learn if row.learnable else None,
    }


def _as_text(row: Activation, settings: dict[str, Any]) -> str:
    def value(name: str, default: Any) -> str:
        return f"{_shown(settings[name])} (default {_shown(default)})" if name in settings else _shown(default)

    parameters = [(e.name, value(e.name, e.default), e.limits(), e.doc) for e in row.parameters]
    learnable = [(e.name, value(e.name, e.initial), e.doc) for e in row.learnable]
    lines = [
        f"{row.name}: {row.summary}",
        f"  source      {row.source}",
        f"  form        {'gated: phi(g, u)' if row.gated else 'un-gated: phi(x)'}"
        + (", over the whole row of a token" if row.rowwise else ", element by element"),
        f"  hidden_act  {row.hidden_act}",
        f"  forward     {row.flops_per_element} FLOPs per output element, {row.forward_bytes(2)} bytes in bf16, "
        f"{row.forward_bytes(4)} in fp32",
        f"  backward    {row.backward_bytes(2)} bytes in bf16, {row.backward_bytes(4)} in fp32",
    ]
    if parameters:
        lines += ["  parameters (name, value, allowed, meaning)", *(f"    {line}" for line in table(parameters))]
    if learnable:
        learn = settings.get("learn", row.learn)
        lines += [f"  scalars (name, initial value, meaning), learn: {learn}"]
        lines += [f"    {line}" for line in table(learnable)]
    lines += ["  math", *(f"    {line}" for line in row.math_source().splitlines())]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "to be given"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_shown(entry) for entry in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plot(chosen: dict[str, ResolvedActivation], path: Path) -> None:
    """Value and derivative of each activation, by its label, beside SwiGLU's, in panels.

    Raises:
        UserError: matplotlib is missing, or the file is there already, of no known kind, or cannot be written.
    """
    from ling.platform import optional

    found = optional.find("matplotlib")
    if found.problem is not None:
        raise UserError(f"--plot: matplotlib: {found.problem}; pip install matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.exists():
        raise UserError(f"--plot: {path} is there already; give another name, or remove it")
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lstrip(".") not in kinds:
        raise UserError(f"--plot: {path}: the name must end in one of {', '.join(kinds)}")
    chosen = {"swiglu": resolve("swiglu"), **chosen}
    gated = {label: resolved for label, resolved in chosen.items() if resolved.activation.gated}
    forms = {"u = 1" if gated == chosen else "u = 1 where gated": chosen}
    if len(gated) > 1 or gated == chosen:
        forms["u = x (one input)"] = gated
    figure = Figure(figsize=(11, 4 * len(forms)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(forms), 2, squeeze=False)
    for (form, members), (left, right) in zip(forms.items(), panels, strict=True):
        for label, resolved in members.items():
            x, y, slope = _curve(resolved, one_input=form.startswith("u = x"))
            left.plot(x, y, label=label)
            right.plot(x, slope, label=label)
        for panel, what in ((left, "value"), (right, "derivative")):
            panel.set(title=f"{what}, {form}", xlabel="x", ylabel=what)
            panel.grid(alpha=0.3)
            panel.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot: {path} cannot be written ({error.strerror}); give another name") from error


def _label(name: str, settings: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={_shown(value)}" for key, value in settings.items())])


def _curve(resolved: ResolvedActivation, one_input: bool) -> tuple[list[float], list[float], list[float]]:
    """Points of the gate (or x), values and derivatives, in float64.

    The points are one token for row-wise activations, and the derivative is taken at fixed statistics.
    """
    import torch

    from ling.activations.reference import WholeRows, phi

    class FixedRows(WholeRows):
        def mean(self, x: Tensor) -> Tensor:
            return super().mean(x).detach()

    x = torch.linspace(*PLOTTED[:2], PLOTTED[2], dtype=torch.float64).requires_grad_()
    up = x if one_input else torch.ones_like(x)
    scalars = torch.tensor(resolved.initial_scalars(), dtype=torch.float64)
    # a gated one is element by element: gate ‖ up of one token that is as wide as there are points
    inputs = torch.cat([x, up])[None] if resolved.activation.gated else x[None]
    y = phi(resolved.activation, inputs, resolved.for_layer(0), scalars, FixedRows())
    (slope,) = torch.autograd.grad(y.sum(), x)
    return x.tolist(), y[0].tolist(), slope.tolist()
