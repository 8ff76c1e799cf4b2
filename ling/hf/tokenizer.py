"""A checkpoint's tokenizer as the files that transformers reads.

A SentencePiece model becomes a tokenizer.json (the format of the `tokenizers` package) with the same pieces: BPE merges
are the splits of a piece into two others, in the order of the scores. Sources: sentencepiece_model.proto of
SentencePiece; the documentation of the `tokenizers` package.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ling.config.errors import UserError
from ling.data.tokenizer import METADATA_FILE, MODEL_FILE, SPACE_MARK, SentencePieceTokenizer, Tokenizer, load_tokenizer

HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2


@dataclass
class TokenizerFiles:
    """Files for a model directory, and the ids `bos`, `eos`, `pad` (null where there is none)."""

    files: dict[str, bytes]
    tokens: dict[str, int | None]
    vocab_size: int


def tokenizer_files(folder: Path, longest: int) -> TokenizerFiles:
    """The files of a checkpoint's `tokenizer` folder in the form of a model directory.

    Args:
        longest: longest sequence of the model, in tokens.

    Raises:
        UserError: there is no tokenizer, or it cannot be expressed.
    """
    tokenizer = load_tokenizer(folder)
    pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    tokens = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": pad}
    if not isinstance(tokenizer, SentencePieceTokenizer):
        files = {name: (folder / name).read_bytes() for name in HF_FILES if (folder / name).is_file()}
        files.setdefault("tokenizer_config.json", _dump({"tokenizer_class": "PreTrainedTokenizerFast"}))
        return TokenizerFiles(files, tokens, tokenizer.vocab_size)
    model = _Model.parse(tokenizer.path.read_bytes(), tokenizer.path)
    files = {
        "tokenizer.json": _dump(_tokenizer_json(model, tokenizer.path)),
        "tokenizer_config.json": _dump(_tokenizer_config(model, tokenizer, tokens, longest)),
        MODEL_FILE: tokenizer.path.read_bytes(),
    }
    if (folder / METADATA_FILE).is_file():
        files[METADATA_FILE] = (folder / METADATA_FILE).read_bytes()
    return TokenizerFiles(files, tokens, tokenizer.vocab_size)


def copy_back(model_dir: Path, target: Path) -> Tokenizer:
    """Put the tokenizer of a model directory into the new folder `target`, in the form that it has in a checkpoint."""
    names = (MODEL_FILE, METADATA_FILE) if (model_dir / MODEL_FILE).is_file() else HF_FILES
    found = [name for name in names if (model_dir / name).is_file()]
    if not found:
        raise UserError(f"{model_dir} has no tokenizer: neither {MODEL_FILE} nor tokenizer.json")
    target.mkdir(parents=True)
    for name in found:
        (target / name).write_bytes((model_dir / name).read_bytes())
    return load_tokenizer(target)


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


# ---- SentencePiece


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


@dataclass
class _Model:
    """What a SentencePiece model file says."""

    pieces: list[_Piece]
    model_type: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    @classmethod
    def parse(cls, content: bytes, path: Path) -> _Model:
        try:
            pieces, trainer, normalizer = [], {}, {}
            for number, value in _fields(content):
                if number == 1:
                    piece = dict(_fields(value))
                    score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
                    pieces.append(_Piece(piece[1].decode("utf-8"), score, piece.get(3, _NORMAL)))
                elif number == 2:
                    trainer = dict(_fields(value))
                elif number == 3:
                    normalizer = dict(_fields(value))
        except (IndexError, KeyError, UnicodeDecodeError, struct.error, ValueError) as error:
            raise UserError(f"{path} cannot be read as a SentencePiece model ({error!r})") from None
        prefix, extra = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
        return cls(pieces, trainer.get(3, _UNIGRAM), normalizer.get(2, b""), prefix, extra)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer message: integers, or bytes for all else."""
    position = 0

    def varint() -> int:
        nonlocal position
        result = shift = 0
        while True:
            byte = data[position]
            position += 1
            result |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return result

    while position < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind}")
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield key >> 3, data[position : position + size]
        position += size


def _tokenizer_json(model: _Model, path: Path) -> dict[str, Any]:
    if model.model_type not in (_UNIGRAM, _BPE):
        raise UserError(f"{path} is neither a BPE nor a unigram model; a tokenizer.json cannot express it")
    if model.remove_extra_whitespaces:
        raise UserError(
            f"{path} drops repeated spaces; such a tokenizer is not exported, since nothing gives them back"
        )
    normalizers: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE_MARK})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(model)),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(model) if model.model_type == _BPE else _unigram(model),
    }


def _added_tokens(model: _Model) -> Iterator[dict[str, Any]]:
    for number, piece in enumerate(model.pieces):
        if piece.kind in (_UNKNOWN, _CONTROL, _USER):
            yield {
                "id": number,
                "content": piece.text.replace(SPACE_MARK, " ") if piece.kind == _USER else piece.text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": piece.kind != _USER,
            }


def _bpe(model: _Model) -> dict[str, Any]:
    number = {piece.text: i for i, piece in enumerate(model.pieces)}
    parts = {piece.text for piece in model.pieces if piece.kind == _NORMAL}
    merges = []
    for piece in model.pieces:
        if piece.kind == _NORMAL:
            for cut in range(1, len(piece.text)):
                left, right = piece.text[:cut], piece.text[cut:]
                if left in parts and right in parts:
                    merges.append((-piece.score, number[left], number[right], left, right))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _unknown(model)[1],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": any(piece.kind == _BYTE for piece in model.pieces),
        "ignore_merges": False,
        "vocab": number,
        "merges": [[left, right] for *_, left, right in sorted(merges)],
    }


def _unigram(model: _Model) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": _unknown(model)[0],
        "vocab": [[piece.text, piece.score] for piece in model.pieces],
        "byte_fallback": any(piece.kind == _BYTE for piece in model.pieces),
    }


def _unknown(model: _Model) -> tuple[int, str]:
    return next((i, piece.text) for i, piece in enumerate(model.pieces) if piece.kind == _UNKNOWN)


def _tokenizer_config(
    model: _Model, tokenizer: Tokenizer, tokens: dict[str, int | None], longest: int
) -> dict[str, Any]:
    named = {f"{name}_token": model.pieces[index].text for name, index in tokens.items() if index is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "unk_token": _unknown(model)[1],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
