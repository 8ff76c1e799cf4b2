"""Lengths of time as people and schedulers write them."""

from __future__ import annotations

import re

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Seconds of `23:50:00`, `2-00:00:00` (days), `90m`, `1.5h`, or a plain number of seconds.

    Raises:
        ValueError: it is none of these, or no time at all.
    """
    clock, amount = _CLOCK.fullmatch(text.strip()), _AMOUNT.fullmatch(text.strip())
    if clock:
        days, hours, minutes, rest = (int(part or 0) for part in clock.groups())
        seconds = float(days * 86400 + hours * 3600 + minutes * 60 + rest)
    elif amount:
        seconds = float(amount[1]) * _SECONDS[amount[2]]
    else:
        raise ValueError(f"{text!r} is no length of time; write 23:50:00, 2-00:00:00, 90m or a number of seconds")
    if seconds <= 0:
        raise ValueError(f"{text!r} is no time at all; give more than 0 seconds")
    return seconds
