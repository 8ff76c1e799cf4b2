"""Tokenizers behind one small interface: SentencePiece (and its training) and Hugging Face's tokenizer.json."""

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

from ling.config.errors import UserError
from ling.data.records import Source, check_inputs, iter_texts

MODEL_FILE = "tokenizer.model"
METADATA_FILE = "ling_tokenizer.json"
FORMAT_VERSION = 1
MODEL_TYPES = ("bpe", "unigram")
LONGEST_SENTENCE = 4000  # bytes; SentencePiece drops longer lines without a word, so they are cut
SPACE_MARK = "\u2581"  # how SentencePiece writes a space


class Tokenizer(ABC):
    """Text to token ids and back. `fingerprint` changes whenever the model's bytes do."""

    path: Path
    fingerprint: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int | None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without any special token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Raises UserError where the file is none, or has no end-of-document token."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        model = _read_bytes(path)
        try:
            self._model = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} is no SentencePiece model: give a folder of `ling tokenizer train`") from error
        self.path = path
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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens decode to nothing."""
        return self._model.decode(list(ids))


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json through the `tokenizers` package, special tokens from the tokenizer_config.json beside it."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError as error:
            raise UserError(f"{path} needs the package `tokenizers`: pip install tokenizers") from error
        content = _read_bytes(path)
        try:
            self._model = Fast.from_str(content.decode("utf-8"))
        except Exception as error:  # the package raises bare Exception for anything wrong with the file
            raise UserError(f"{path} is no Hugging Face tokenizer ({str(error).splitlines()[0]})") from error
        self.path = path
        self.fingerprint = fingerprint_of(content)
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        named = self._special_tokens()
        if named["eos"] is None:
            raise UserError(
                f"{path}: which token ends a document? Put a tokenizer_config.json with eos_token beside it"
            )
        self.eos_id, self.bos_id, self.pad_id = named["eos"], named["bos"], named["pad"]

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without any special token."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without the special tokens."""
        return self._model.decode(list(ids))

    def _special_tokens(self) -> dict[str, int | None]:
        found: dict[str, int | None] = dict.fromkeys(("eos", "bos", "pad"))
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            file = self.path.with_name(name)
            config = _read_json(file) if file.exists() else {}
            for key in found:
                token = config.get(f"{key}_token")
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    found[key] = self._model.token_to_id(token)
        return found


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`.

    path: a folder of `ling tokenizer train`, a SentencePiece .model, a Hugging Face tokenizer.json or its folder.
    Raises UserError where there is none, where its file is damaged, or where the package to read it is missing.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"tokenizer {path}: no such file or folder; make one with `ling tokenizer train`")
    if path.is_file():
        return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
    if (path / METADATA_FILE).exists():
        tokenizer = SentencePieceTokenizer(path / MODEL_FILE)
        noted = _read_json(path / METADATA_FILE).get("fingerprint")
        if noted != tokenizer.fingerprint:
            raise UserError(
                f"{path / MODEL_FILE} is not the model that {METADATA_FILE} beside it describes: train it anew"
            )
        return tokenizer
    if (path / "tokenizer.json").exists():
        return HuggingFaceTokenizer(path / "tokenizer.json")
    if (path / MODEL_FILE).exists():
        return SentencePieceTokenizer(path / MODEL_FILE)
    raise UserError(f"tokenizer {path}: the folder has neither {MODEL_FILE} nor tokenizer.json")


def fingerprint_of(model: bytes) -> str:
    """The first 32 hex digits of the SHA-256 of a tokenizer's model file."""
    return hashlib.sha256(model).hexdigest()[:32]


def train_sentencepiece(
    inputs: Sequence[Path],
    vocab_size: int,
    output: Path,
    model_type: str = "bpe",
    *,
    field: str = "text",
    split_digits: bool = True,
    character_coverage: float = 0.9995,
    user_symbols: Sequence[str] = (),
) -> Tokenizer:
    """Train a SentencePiece model whose encoding gives every text back exactly, and write it to the folder `output`.

    inputs: text or JSONL files (`field` holds the text), plain or gzipped. The model has `vocab_size` tokens: unknown,
    begin, end, 256 bytes, `user_symbols`, and learned pieces; the same inputs and options give the same bytes.
    Raises UserError for a non-empty output, an unreadable input or an impossible vocabulary; then nothing is written.
    """
    if model_type not in MODEL_TYPES:
        raise UserError(f"--type {model_type}: choose one of {', '.join(MODEL_TYPES)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: choose another --output, or remove it")
    check_inputs(inputs)
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "model_type": model_type,
        "split_digits": split_digits,
        "character_coverage": character_coverage,
        "user_defined_symbols": list(user_symbols),
    }
    sources = [Source(path) for path in inputs]
    model = _train(_sentences(sources, field), options)
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
            "sources": [source.describe() for source in sources],
        }
        (partial / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load_tokenizer(output)


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
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
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


def _sentences(sources: Sequence[Source], field: str) -> Iterator[str]:
    for text in iter_texts(sources, field):
        for line in text.splitlines():
            for start in range(0, len(line), LONGEST_SENTENCE // 4):
                yield line[start : start + LONGEST_SENTENCE // 4]


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): the tokenizer is damaged, train or fetch it anew") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: the tokenizer is damaged, train or fetch it anew")
    return value
