"""Tokenizers behind one small interface: SentencePiece and its training here, Hugging Face's in huggingface.py."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ling.config.errors import UserError
from ling.data.inputs import Input, find_inputs
from ling.data.records import iter_texts
from ling.data.words import SPACE_MARK, WordCache, read_model, word_pattern

MODEL_FILE = "tokenizer.model"
METADATA_FILE = "ling_tokenizer.json"
FORMAT_VERSION = 1
MODEL_TYPES = ("bpe", "unigram")
NORMALIZATIONS = ("identity", "nfkc", "nfkc_cf", "nmt_nfkc", "nmt_nfkc_cf")
LONGEST_SENTENCE = 4000  # bytes; SentencePiece drops longer lines without a word, so they are cut


class Tokenizer(ABC):
    """Text to token ids and back.

    `fingerprint` changes whenever the model does. `vocab_size` is one more than the largest id. `bos_id` and `pad_id`
    are null where the model has none. No text is encoded to the end-of-document token. `files` is all that a copy of
    the tokenizer needs.
    """

    path: Path
    files: list[Path]
    fingerprint: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int | None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without any special token."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What `encode` gives for each text, as int32; faster for many texts."""
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Raises UserError where the file is none, or has no end-of-document token."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        model = read_bytes(path)
        try:
            self._model = SentencePieceProcessor(model_proto=model)
            pattern = word_pattern(read_model(model))
        except (RuntimeError, ValueError, LookupError) as error:
            raise UserError(f"{path} is no SentencePiece model: give a folder of `ling tokenizer train`") from error
        self._words = WordCache(self._model.encode, pattern) if pattern else None
        self.path = path
        self.files = [file for file in (path, path.with_name(METADATA_FILE)) if file.exists()]
        self.fingerprint = fingerprint_of(model)
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id()
        self.bos_id = _id_or_none(self._model.bos_id())
        self.pad_id = _id_or_none(self._model.pad_id())
        if self.eos_id < 0:
            raise UserError(f"{path} has no end-of-document token: train the model with an eos id")
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]
        # the mark itself, where the text has it, goes as bytes: as a piece it would come back as a space
        self._mark_ids = byte_ids if all(map(self._model.is_byte, byte_ids)) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without any special token."""
        if self._mark_ids is None or SPACE_MARK not in text:
            return self._model.encode(text)
        first, *others = text.split(SPACE_MARK)
        ids = self._model.encode(first)
        for part in others:
            ids += self._mark_ids + self._model.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What `encode` gives for each text, as int32, through a cache of words where the model allows it."""
        if self._words is None:
            return super().encode_batch(texts)
        words = self._words
        return [
            np.array(self.encode(text), dtype=np.int32) if SPACE_MARK in text else words.encode(text) for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens decode to nothing."""
        return self._model.decode(list(ids))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`.

    path: a folder of `ling tokenizer train`, a SentencePiece .model, a Hugging Face tokenizer.json, or a folder of
    Hugging Face's.
    Raises UserError where there is none, where its file is damaged, or where the package to read it is missing.
    """
    from ling.data.huggingface import AutoTokenizer, FastTokenizer

    path = Path(path)
    if not path.exists():
        raise UserError(f"tokenizer {path}: no such file or folder; make one with `ling tokenizer train`")
    if path.is_file():
        return FastTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
    if (path / METADATA_FILE).exists():
        tokenizer = SentencePieceTokenizer(path / MODEL_FILE)
        noted = read_json(path / METADATA_FILE).get("fingerprint")
        if noted != tokenizer.fingerprint:
            raise UserError(
                f"{path / MODEL_FILE} is not the model that {METADATA_FILE} beside it describes: train it anew"
            )
        return tokenizer
    if (path / "tokenizer.json").exists():
        return FastTokenizer(path / "tokenizer.json")
    if (path / MODEL_FILE).exists():
        return SentencePieceTokenizer(path / MODEL_FILE)
    if (path / "tokenizer_config.json").exists():
        return AutoTokenizer(path)
    raise UserError(f"tokenizer {path}: the folder has neither {MODEL_FILE} nor tokenizer.json")


def fingerprint_of(model: bytes) -> str:
    """The first 32 hex digits of the SHA-256 of a tokenizer's model file."""
    return hashlib.sha256(model).hexdigest()[:32]


def train_sentencepiece(
    inputs: Sequence[str | Path],
    vocab_size: int,
    output: Path,
    model_type: str = "bpe",
    *,
    field: str = "text",
    split_digits: bool = True,
    byte_fallback: bool = True,
    normalization: str = "identity",
    character_coverage: float = 0.9995,
    user_symbols: Sequence[str] = (),
    vocab_multiple: int = 1,
) -> Tokenizer:
    """Train a SentencePiece model and write it to the folder `output`.

    With the defaults its encoding gives every text back exactly.

    inputs: see `find_inputs`; `field` holds the text of JSONL and Parquet. The model has `vocab_size` tokens: unknown,
    begin, end, 256 bytes (with byte_fallback), `user_symbols`, and learned pieces; and reserved ones, <|reserved_0|>
    and so on, which no text is encoded to, up to a multiple of `vocab_multiple`. The same inputs and options give the
    same bytes. normalization: SentencePiece's rule, one of NORMALIZATIONS.
    Raises UserError for a non-empty output, an unreadable input or an impossible vocabulary; then nothing is written.
    """
    for option, value, choices in (("type", model_type, MODEL_TYPES), ("normalization", normalization, NORMALIZATIONS)):
        if value not in choices:
            raise UserError(f"--{option} {value}: choose one of {', '.join(choices)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: choose another --output, or remove it")
    sources = find_inputs(inputs)
    padding = -vocab_size % vocab_multiple
    options: dict[str, Any] = {
        "vocab_size": vocab_size + padding,
        "model_type": model_type,
        "split_digits": split_digits,
        "byte_fallback": byte_fallback,
        "normalization_rule_name": normalization,
        "character_coverage": character_coverage,
        "user_defined_symbols": list(user_symbols),
        "control_symbols": [f"<|reserved_{number}|>" for number in range(padding)],
    }
    model = _train(iter_sentences(sources, field), options)
    _write_folder(output, model, options, [source.describe() for source in sources])
    return load_tokenizer(output)


def _write_folder(output: Path, model: bytes, options: dict[str, Any], sources: list[dict[str, object]]) -> None:
    """The tokenizer's folder, written aside and renamed."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        (partial / MODEL_FILE).write_bytes(model)
        tokenizer = SentencePieceTokenizer(partial / MODEL_FILE)
        metadata = {
            "format_version": FORMAT_VERSION,
            "kind": "sentencepiece",
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "bos_id": tokenizer.bos_id,
            "pad_id": tokenizer.pad_id,
            "options": options,
            "sources": sources,
        }
        (partial / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _train(sentences: Iterator[str], options: dict[str, Any]) -> bytes:
    from sentencepiece import SentencePieceTrainer

    first = next(sentences, None)
    if first is None:
        raise UserError("the input files hold no text to train a tokenizer on")
    raised: list[Exception] = []

    def guarded() -> Iterator[str]:  # an exception inside the iterator would end the process or be lost in C++
        try:
            yield first
            yield from sentences
        except UserError as error:
            raised.append(error)

    model = io.BytesIO()
    failure = None
    try:
        SentencePieceTrainer.train(
            sentence_iterator=guarded(),
            model_writer=model,
            **options,
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=16,  # fixed: the sums of unigram training depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        failure = error
    if raised:
        raise raised[0]
    if failure:
        reason = str(failure).splitlines()[-1].split("] ", 1)[-1]
        # its advice names options of its own command
        reason = re.sub(r"Increase vocab_size .*", "Give a larger --vocab-size.", reason)
        raise UserError(
            f"SentencePiece cannot train {options['vocab_size']} tokens on this input: {reason}"
        ) from failure
    return model.getvalue()


def iter_sentences(sources: Sequence[Input], field: str) -> Iterator[str]:
    """The lines that SentencePiece trains on, long ones in parts."""
    for text in iter_texts(sources, field):
        for line in text.splitlines():
            for start in range(0, len(line), LONGEST_SENTENCE // 4):
                yield line[start : start + LONGEST_SENTENCE // 4]


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def read_bytes(path: Path) -> bytes:
    """A file of a tokenizer. Raises UserError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a tokenizer. Raises UserError."""
    try:
        value = json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): the tokenizer is damaged, train or fetch it anew") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: the tokenizer is damaged, train or fetch it anew")
    return value
