"""What a run prints for people: its banner, a line per step, a line per evaluation.

Records come as they are logged; whatever key a record lacks is left out of its line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def step_line(record: Mapping[str, Any], train_iters: int | None) -> str:
    """One line for a step, such as

    step   120/400 | loss 4.8123 | mtp 5.02 | grad 0.71 | lr 1.9e-03 | 10.4k tok/s/device | 392 ms | ETA 1m50s
    """
    rate, unit = _number(record, "tokens_per_s_per_device"), "tok/s/device"
    if rate is None:
        rate, unit = _number(record, "tokens_per_s"), "tok/s"
    parts = [
        "step " + _progress(record.get("step"), train_iters),
        _part("loss {:.4f}", _number(record, "loss")),
        _part("mtp {:.2f}", _number(record, "mtp_loss")),
        _part("grad {:.2f}", _number(record, "grad_norm")),
        _part("lr {:.1e}", _number(record, "lr")),
        f"{short_count(rate)} {unit}" if rate is not None else None,
        _part("{:.3g} TFLOP/s", _number(record, "tflops_per_device")),
        _part("MFU {:.1%}", _number(record, "mfu")),
        _milliseconds(_number(record, "step_ms")),
        _eta(record, train_iters),
    ]
    return " | ".join(part for part in parts if part)


def eval_line(record: Mapping[str, Any]) -> str:
    """One line for an evaluation: the loss in nats per token and the perplexity of every held-out set."""
    parts = ["eval at step " + _progress(record.get("step"), None)]
    losses = record.get("eval")
    for name, value in losses.items() if isinstance(losses, Mapping) else ():
        loss = _as_float(value)
        if loss is not None:
            perplexity = f" (perplexity {math.exp(loss):.4g})" if loss < 100 else ""
            parts.append(f"{name} {loss:.4f}{perplexity}")
    return " | ".join(parts)


def banner(
    *,
    name: str,
    parameters: Mapping[str, int],
    layout: Mapping[str, int],
    devices: str,
    precision: str,
    choices: Iterable[tuple[str, str, str]] = (),
    changes: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """What a run is, printed once before its first step.

    Args:
        parameters: numbers by name, as `{"total": 7_900_000_000, "activated": 1_400_000_000}`.
        layout: sizes by name, as `{"TP": 2, "PP": 1, "EP": 4, "DP": 8}`.
        devices: as `8 x NVIDIA H200`.
        choices: (operation, implementation, reason) of what was picked.
        changes: lines on what differs from the defaults, as `optim.lr = 0.002 (default ...)`.
        notes: further lines, as what was hidden from megatron-core.
    """
    counted = ", ".join(f"{short_count(number)} {kind}" for kind, number in parameters.items())
    rows = [
        ("parameters", counted),
        ("layout", " ".join(f"{axis}={size}" for axis, size in layout.items())),
        ("devices", devices),
        ("precision", precision),
    ]
    lines = [f"ling: {name}", *(f"  {label:<12}{text}" for label, text in rows if text)]
    lines += _block("implementations", table(choices))
    lines += _block("differs from the defaults", changes)
    lines += _block("notes", notes)
    return "\n".join(lines)


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows of text with aligned columns."""
    listed = [tuple(str(cell) for cell in row) for row in rows]
    columns = max((len(row) for row in listed), default=0)
    widths = [max((len(row[i]) for row in listed if i < len(row)), default=0) for i in range(columns)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in listed]


def short_count(number: float) -> str:
    """A number with three digits: 10.4k, 1.40B."""
    if not math.isfinite(number):
        return str(number)
    for factor, prefix in _PREFIXES:
        if abs(number) >= factor * 0.9995:  # 999,950 is 1.00M, not 1000k
            return f"{_three_digits(number / factor)}{prefix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """A length of time with its two largest units: 1m52s, 3h04m, 2d05h."""
    if not math.isfinite(seconds):
        return "?"
    total = max(0, round(seconds))
    days, hours, minutes, rest = total // 86400, total // 3600 % 24, total // 60 % 60, total % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _three_digits(number: float) -> str:
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}"


def _progress(step: Any, train_iters: int | None) -> str:
    shown = "?" if step is None else str(step)
    return f"{shown:>5}/{train_iters}" if train_iters is not None else shown


def _eta(record: Mapping[str, Any], train_iters: int | None) -> str | None:
    step, step_ms = _number(record, "step"), _number(record, "step_ms")
    if step is None or step_ms is None or train_iters is None or step >= train_iters:
        return None
    return f"ETA {duration((train_iters - step) * step_ms / 1000)}"


def _milliseconds(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.0f} ms" if value >= 99.5 or not math.isfinite(value) else f"{value:.3g} ms"


def _part(template: str, value: float | None) -> str | None:
    return template.format(value) if value is not None else None


def _number(record: Mapping[str, Any], key: str) -> float | None:
    return _as_float(record.get(key))


def _as_float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):  # absent, or no number: left out
        return None


def _block(title: str, lines: Sequence[str]) -> list[str]:
    return [f"  {title}", *(f"    {line}" for line in lines)] if lines else []
