"""Tokenizers: exact round trips, training that repeats, loading, and what is said about wrong input."""

from __future__ import annotations

import gzip
import json
import shutil
import sys

import pytest

from ling.config.errors import UserError
from ling.data.tokenizer import load_tokenizer, train_sentencepiece

TRICKY = [
    "",
    " leading and trailing ",
    "a  b\n\n\tc\r\n",
    "x\u2581y \u2581\u2581",
    "nul\0 byte",
    "é 漢字 \U0001f600 \ufeff\u2028",
    "</s><s><unk><0x41>",
    "ﬁ ① Ａ — not normalised",
]


@pytest.mark.parametrize("text", TRICKY)
def test_every_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eos_id, tokenizer.bos_id, 0} & set(ids)


def test_documents_come_back_exactly(tokenizer, texts):
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_digits_are_split(tokenizer):
    assert len(tokenizer.encode("1623")) >= 4


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_repeats_and_describes_itself(tmp_path, jsonl, model_type):
    first = train_sentencepiece([jsonl], 310, tmp_path / "a", model_type)
    second = train_sentencepiece([jsonl], 310, tmp_path / "deeper" / "b", model_type)
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 310
    noted = json.loads((tmp_path / "a" / "ling_tokenizer.json").read_text())
    assert noted["fingerprint"] == first.fingerprint
    assert noted["sources"][0]["bytes"] == jsonl.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "deeper"]


def test_user_symbols_are_one_token(tmp_path, jsonl):
    trained = train_sentencepiece([jsonl], 330, tmp_path / "t", user_symbols=["<|user|>"])
    assert len(trained.encode("<|user|>")) == 1
    assert trained.decode(trained.encode("a <|user|> b")) == "a <|user|> b"


def test_vocabulary_is_padded_with_reserved_tokens(tmp_path, jsonl):
    plain = train_sentencepiece([jsonl], 310, tmp_path / "plain")
    padded = train_sentencepiece([jsonl], 310, tmp_path / "padded", vocab_multiple=128)
    assert (plain.vocab_size, padded.vocab_size) == (310, 384)
    text = "the quick <|reserved_0|> <|reserved_73|>"
    assert len(padded.encode(text)) == len(plain.encode(text))  # as text
    assert padded.decode(padded.encode(text)) == text


def test_normalisation_and_byte_fallback(tmp_path, jsonl):
    folded = train_sentencepiece([jsonl], 310, tmp_path / "folded", normalization="nfkc_cf")
    assert folded.decode(folded.encode("ﬁ ① THE")) == "fi 1 the"
    lossy = train_sentencepiece([jsonl], 120, tmp_path / "lossy", byte_fallback=False)
    assert 0 in lossy.encode("漢")
    (tmp_path / "digits.txt").write_text("1623 " * 99)
    joined = train_sentencepiece([tmp_path / "digits.txt"], 267, tmp_path / "joined", split_digits=False)
    assert len(joined.encode("1623")) < 4
    with pytest.raises(UserError, match="--normalization latin: choose one of identity, nfkc"):
        train_sentencepiece([jsonl], 310, tmp_path / "x", normalization="latin")


def test_files_are_all_that_a_copy_needs(tmp_path, tokenizer):
    assert [path.name for path in tokenizer.files] == ["tokenizer.model", "ling_tokenizer.json"]
    for path in tokenizer.files:
        shutil.copy(path, tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_text_and_gzip_are_read(tmp_path, texts, tokenizer):
    plain = tmp_path / "text.txt"
    plain.write_text("\n".join(texts))
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    one, two = (train_sentencepiece([path], 330, tmp_path / path.suffix[1:]) for path in (plain, packed))
    assert one.fingerprint == two.fingerprint != tokenizer.fingerprint


def test_bare_model_is_the_same_tokenizer(tokenizer_dir, tokenizer):
    bare = load_tokenizer(tokenizer_dir / "tokenizer.model")
    assert (bare.fingerprint, bare.eos_id, bare.vocab_size) == (tokenizer.fingerprint, 2, tokenizer.vocab_size)
    assert (bare.bos_id, bare.pad_id) == (1, None)


@pytest.mark.parametrize(
    ("vocab_size", "model_type", "said"),
    [
        (100_000, "bpe", "too high"),
        (100, "bpe", "smaller than"),
        (-1, "bpe", "cannot train"),
        (300, "char", "bpe, unigram"),
    ],
)
def test_impossible_vocabulary_leaves_nothing(tmp_path, jsonl, vocab_size, model_type, said):
    with pytest.raises(UserError, match=said) as raised:
        train_sentencepiece([jsonl], vocab_size, tmp_path / "t", model_type)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_wrong_training_input(tmp_path, tokenizer_dir, jsonl):
    with pytest.raises(UserError, match="exists already"):
        train_sentencepiece([jsonl], 300, tokenizer_dir)
    with pytest.raises(UserError, match="no such file"):
        train_sentencepiece([tmp_path / "none.txt"], 300, tmp_path / "t")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([empty], 300, tmp_path / "t")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "good"}) + '\n{"txt": 1}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2: no text in the field 'text' \(fields: txt\)"):
        train_sentencepiece([bad], 300, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_wrong_tokenizers(tmp_path, tokenizer_dir):
    with pytest.raises(UserError, match="no such file or folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="no SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
    changed = tmp_path / "changed"
    shutil.copytree(tokenizer_dir, changed)
    train_sentencepiece([tokenizer_dir.parent / "text.jsonl"], 310, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.model", changed / "tokenizer.model")
    with pytest.raises(UserError, match="is not the model that"):
        load_tokenizer(changed)


def test_hugging_face_needs_its_package(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


def test_hugging_face_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<end>"])
    model.enable_truncation(3)
    model.enable_padding(length=8)
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer_config.json with eos_token"):
        load_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<end>"}, "bos_token": None}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("b a") == [1, 0]
    assert loaded.encode("a " * 9) == [0] * 9  # neither cut nor padded
    assert 3 not in loaded.encode("a <end> b")  # the text does not end there
    assert [ids.tolist() for ids in loaded.encode_batch(["b a", "", "a <end>"])] == [
        loaded.encode(text) for text in ("b a", "", "a <end>")
    ]
    assert (loaded.vocab_size, loaded.eos_id, loaded.bos_id, loaded.pad_id) == (4, 3, None, None)
    assert [path.name for path in loaded.files] == ["tokenizer.json", "tokenizer_config.json"]
    assert loaded.fingerprint == load_tokenizer(tmp_path / "tokenizer.json").fingerprint
    config.write_text(json.dumps({"eos_token": "b"}))
    assert loaded.fingerprint != load_tokenizer(tmp_path).fingerprint
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no Hugging Face tokenizer"):
        load_tokenizer(tmp_path)


def test_other_folders_go_to_transformers(tmp_path, monkeypatch):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="has no tokenizer.json; to read it as it is, pip install transformers"):
        load_tokenizer(tmp_path)
