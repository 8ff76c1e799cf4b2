"""Encoding by cached words gives what SentencePiece gives for the whole text, or is not used."""

from __future__ import annotations

import random

import pytest
from sentencepiece import SentencePieceProcessor

from ling.data import words
from ling.data.tokenizer import load_tokenizer, train_sentencepiece
from ling.data.words import RUNS, SPACED, read_model, word_pattern
from tests.data.test_tokenizer import TRICKY

ALPHABET = [
    "the",
    "fox",
    "o",
    "v",
    "er",
    " ",
    "  ",
    "\n",
    "\t",
    "é",
    "漢",
    "▁",
    "1",
    "23",
    ".",
    "_",
    "\u0301",
    "\r\n",
    "\u2028",
    "\0",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory, jsonl):
    """Tokenizers of many kinds by name."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {
        "bpe": {},
        "digits": {"split_digits": False},
        "symbols": {"user_symbols": ["<|user|>", "fox  jumps", "\n\n", "▁"], "vocab_multiple": 64},
        "mixed symbols": {"user_symbols": ["fox.1", "v\u0301"]},
        "no bytes": {"byte_fallback": False, "vocab_size": 120},
        "nfkc": {"normalization": "nmt_nfkc"},
        "unigram": {"model_type": "unigram"},
    }
    return {
        name: train_sentencepiece([jsonl], output=folder / name, **{"vocab_size": 310} | options)
        for name, options in kinds.items()
    }


@pytest.mark.parametrize("kind", ["bpe", "digits", "mixed symbols", "symbols", "no bytes", "nfkc", "unigram"])
def test_batches_equal_single_texts(models, texts, kind):
    tokenizer = models[kind]
    draw = random.Random(1)
    mixed = ["".join(draw.choices(ALPHABET, k=draw.randint(0, 40))) for _ in range(400)]
    given = [*TRICKY, *texts[:50], *mixed]
    for text, ids in zip(given, tokenizer.encode_batch(given), strict=True):
        assert ids.dtype.name == "int32"
        assert ids.tolist() == tokenizer.encode(text), repr(text)


def test_how_models_are_cut(models):
    patterns = {name: word_pattern(read_model(model.path.read_bytes())) for name, model in models.items()}
    assert patterns == {
        "bpe": RUNS,
        "digits": RUNS,
        "mixed symbols": SPACED,
        "symbols": None,  # one has a space inside
        "no bytes": None,
        "nfkc": None,
        "unigram": None,
    }


@pytest.mark.parametrize("pattern", [RUNS, SPACED])
def test_words_are_the_whole_text(pattern, texts):
    for text in [*TRICKY, *texts[:50], "".join(map(chr, range(0x3000)))]:
        assert "".join(pattern.findall(text)) == text


def test_the_pieces_are_those_of_the_model(models):
    path = models["symbols"].path
    theirs = SentencePieceProcessor(model_file=str(path))
    matched = [
        theirs.id_to_piece(i)
        for i in range(theirs.vocab_size())
        if not (theirs.is_control(i) or theirs.is_unknown(i) or theirs.is_byte(i))
    ]
    assert read_model(path.read_bytes()).pieces == matched


def test_a_full_cache_starts_anew(tokenizer, texts, monkeypatch):
    fresh = load_tokenizer(tokenizer.path)
    monkeypatch.setattr(words, "MOST_CACHED", 7)
    for text, ids in zip(texts[:20], fresh.encode_batch(texts[:20]), strict=True):
        assert ids.tolist() == tokenizer.encode(text)
    assert 0 < len(fresh._words) <= 7
