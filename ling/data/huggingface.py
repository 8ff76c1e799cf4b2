"""Hugging Face tokenizers through their packages: `tokenizers` for a tokenizer.json, `transformers` for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ling.config.errors import UserError
from ling.data.tokenizer import Tokenizer, fingerprint_of, read_bytes, read_json

SPECIAL = ("eos", "bos", "pad")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class FastTokenizer(Tokenizer):
    """A tokenizer.json; its special tokens are named by the tokenizer_config.json beside it.

    Special tokens that stand in a text are text: only preparation puts the end of a document.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError as error:
            raise UserError(f"{path} needs the package `tokenizers`: pip install tokenizers") from error
        content = read_bytes(path)
        try:
            self._model = Fast.from_str(content.decode("utf-8"))
        except Exception as error:  # the package raises bare Exception for anything wrong with the file
            raise UserError(f"{path} is no Hugging Face tokenizer ({str(error).splitlines()[0]})") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        self.path = path
        self.files = [path, *_existing(path.parent, BESIDE)]
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        named = self._special_tokens()
        if named["eos"] is None:
            raise UserError(
                f"{path}: which token ends a document? Put a tokenizer_config.json with eos_token beside it"
            )
        self.eos_id, self.bos_id, self.pad_id = named["eos"], named["bos"], named["pad"]
        self.fingerprint = fingerprint_of(content + f"\neos {self.eos_id}".encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without any special token."""
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What `encode` gives for each text, as int32."""
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without the special tokens."""
        return self._model.decode(list(ids))

    def _special_tokens(self) -> dict[str, int | None]:
        found: dict[str, int | None] = dict.fromkeys(SPECIAL)
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            file = self.path.with_name(name)
            config = read_json(file) if file.exists() else {}
            for key in found:
                token = config.get(f"{key}_token")
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    found[key] = self._model.token_to_id(token)
        return found


class AutoTokenizer(Tokenizer):
    """A folder with tokenizer_config.json and files that only `transformers` reads; code in the folder is not run."""

    def __init__(self, path: Path) -> None:
        try:
            import transformers
        except ImportError as error:
            raise UserError(f"{path} has no tokenizer.json; to read it as it is, pip install transformers") from error
        try:
            self._model: Any = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the package raises whatever its tokenizer classes do
            raise UserError(f"{path} is no Hugging Face tokenizer ({str(error).splitlines()[0]})") from error
        self.path = path
        self.vocab_size = 1 + max(self._model.get_vocab().values())
        self.eos_id, self.bos_id, self.pad_id = (getattr(self._model, f"{key}_token_id") for key in SPECIAL)
        if self.eos_id is None:
            raise UserError(f"{path}: which token ends a document? Name eos_token in its tokenizer_config.json")
        self.files = _existing(path, [*self._model.vocab_files_names.values(), *BESIDE])
        self.fingerprint = fingerprint_of(
            b"".join(file.name.encode() + b"\n" + read_bytes(file) for file in self.files)
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without any special token."""
        return self._model.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without the special tokens."""
        return self._model.decode(list(ids), skip_special_tokens=True)


def _existing(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in dict.fromkeys(names) if (folder / name).is_file()]
