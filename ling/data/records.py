"""From a block of raw input to texts: JSONL parsed, bytes that are no UTF-8 mended, bad lines named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ling.config.errors import UserError
from ling.data.inputs import Block, Input


class BadRecordError(ValueError):
    """A line that is no JSON object with a text in the wanted field."""


class Record(NamedTuple):
    """One document as read: its raw bytes and the line (from 1) at which it starts."""

    line: int
    raw: bytes


def records_of(block: Block) -> Iterator[Record]:
    """The records of a block; blank lines of JSONL are none."""
    if block.documents is None:
        for number, line in enumerate(block.payload.split(b"\n"), block.line):
            if line and not line.isspace():
                yield Record(number, line)
        return
    start = 0
    for number, size in block.documents:
        yield Record(number, block.payload[start : start + size])
        start += size


def record_text(record: Record, jsonl: bool, field: str) -> tuple[str, bool]:
    """The text of a record, and whether it had to be mended because it is not valid Unicode.

    Bytes that are no UTF-8 and lone surrogates become U+FFFD. Raises BadRecordError for a bad JSONL line.
    """
    try:
        text, mended = record.raw.decode("utf-8"), False
    except UnicodeDecodeError:
        text, mended = record.raw.decode("utf-8", errors="replace"), True
    if not jsonl:
        return text, mended
    try:
        value = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadRecordError(f"a JSON {type(value).__name__} instead of an object")
    if not isinstance(value.get(field), str):
        found = ", ".join(map(str, list(value)[:6])) or "none"
        raise BadRecordError(f"no text in the field {field!r} (fields: {found})")
    text = value[field]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace"), True
    return text, mended


def iter_texts(inputs: Sequence[Input], field: str) -> Iterator[str]:
    """The texts of all inputs in order, bad records raising UserError with file and line."""
    for source in inputs:
        for block in source.blocks(field, separator=""):
            if block.bad:
                raise UserError(block.bad[0])
            for record in records_of(block):
                try:
                    yield record_text(record, block.documents is None, field)[0]
                except BadRecordError as error:
                    raise UserError(f"{block.path}:{record.line}: {error}") from error
