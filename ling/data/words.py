"""Words of a SentencePiece model that can be encoded one by one with the same result, so that frequent ones are cached.

BPE merges neighbours only, best score first and leftmost among equals. Where no piece of the vocabulary reaches over a
boundary, nothing on one side changes what happens on the other, and the text may be cut there. Whether two characters
are parted depends on these two alone, so a vocabulary none of whose pieces is parted allows the cuts. Unigram models
are not cut: their sums of scores round differently in parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

SPACE_MARK = "\u2581"  # how SentencePiece writes a space
# each run of letters, digits or other characters, with the spaces before it; a line end stands alone
RUNS = re.compile(r" *(?:[^\W\d_]+|\d+|(?:[^\w \n]+|_+)+)| +|\n")
# all up to the next space, with the spaces before it
SPACED = re.compile(r" *[^ \n]+| +|\n")
LONGEST_CACHED, MOST_CACHED = 48, 1 << 17  # characters, words: at most some 30 MB
BPE = 2
NEVER_MATCHED = (2, 3, 6)  # types of pieces: unknown, control, byte


class ModelFile(NamedTuple):
    """What decides about cutting, from a SentencePiece model file (sentencepiece_model.proto)."""

    pieces: list[str]  # those that match text
    is_bpe: bool
    byte_fallback: bool
    space_is_suffix: bool
    changes_text: bool  # normalises, adds a space in front, or drops spaces


def read_model(model: bytes) -> ModelFile:
    """Parse a SentencePiece model. Raises ValueError or IndexError where it is none."""
    pieces: list[str] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(model):
        if number == 1:
            piece = dict(_fields(_as_bytes(value)))
            if piece.get(3, 1) not in NEVER_MATCHED:
                pieces.append(_as_bytes(piece[1]).decode("utf-8"))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
    return ModelFile(
        pieces,
        is_bpe=trainer.get(3, 1) == BPE,
        byte_fallback=bool(trainer.get(35, 0)),
        space_is_suffix=bool(trainer.get(24, 0)),
        changes_text=bool(normalizer.get(2))
        or any(normalizer.get(key, 1) for key in (3, 4))
        or not normalizer.get(5, 1),
    )


def word_pattern(model: ModelFile) -> re.Pattern[str] | None:
    """What cuts a text into words so that encoding them one by one gives what the whole text gives; None: nothing."""
    if not model.is_bpe or not model.byte_fallback or model.space_is_suffix or model.changes_text:
        return None
    texts = [piece.replace(SPACE_MARK, " ") for piece in model.pieces]
    for pattern in (RUNS, SPACED):
        if all(pattern.fullmatch(text) for text in texts):
            return pattern
    return None


class WordCache(dict[str, bytes]):
    """Word -> its token ids as int32 bytes. A full cache starts anew: its size is bounded whatever the text."""

    def __init__(self, encode: Callable[[str], list[int]], pattern: re.Pattern[str]) -> None:
        super().__init__()
        self._encode = encode
        self._pattern = pattern

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._encode(word), dtype=np.int32).tobytes()
        if len(word) <= LONGEST_CACHED:
            if len(self) >= MOST_CACHED:
                self.clear()
            self[word] = ids
        return ids

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text: int32."""
        return np.frombuffer(b"".join(map(self.__getitem__, self._pattern.findall(text))), dtype=np.int32)


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a Protocol Buffers message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
