"""tokenizer.json says the same as the SentencePiece model that it was made of."""

import json

import pytest

from ling.config.errors import UserError
from ling.data.tokenizer import load_tokenizer, train_sentencepiece
from ling.hf.tokenizer import copy_back, tokenizer_files

TEXTS = [
    "To be, or not to be, that is the question:",
    "  two  spaces,\ttab\nand\r\nlines   ",
    "1234567890 3.14",
    "naïve café — ☃ 中文 \U0001f600",
    "",
    " ",
    "theqtherethethe the<mark>then",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request, tmp_path_factory):
    base = tmp_path_factory.mktemp(request.param)
    words = [
        "the",
        "then",
        "there",
        "these",
        "question",
        "answer",
        "be",
        "been",
        "being",
        "that",
        "this",
        "those",
        "is",
        "was",
        "were",
        "not",
        "nor",
        "now",
    ]
    text = "\n".join(" ".join(words[(i * k) % len(words)] for i in range(40)) for k in range(1, 60))
    (base / "text.txt").write_text(text)
    train_sentencepiece([base / "text.txt"], 285, base / "tokenizer", request.param, user_symbols=["<mark>"])
    return base / "tokenizer"


def test_the_same_tokens(folder):
    package = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    ours = load_tokenizer(folder)
    theirs = package.Tokenizer.from_str(tokenizer_files(folder, 64).files["tokenizer.json"].decode())
    corpus = (folder.parent / "text.txt").read_text()
    for text in [*TEXTS, corpus[:2000]]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.decode(ids) == text
    assert theirs.get_vocab_size() == ours.vocab_size


def test_special_tokens(folder):
    found = tokenizer_files(folder, 64)
    assert found.tokens == {"bos": 1, "eos": 2, "pad": 2}
    config = json.loads(found.files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<s>", "</s>", "</s>")
    assert config["model_max_length"] == 64


def test_the_way_back(folder, tmp_path):
    (tmp_path / "hf").mkdir()
    for name, content in tokenizer_files(folder, 64).files.items():
        (tmp_path / "hf" / name).write_bytes(content)
    assert copy_back(tmp_path / "hf", tmp_path / "tokenizer").fingerprint == load_tokenizer(folder).fingerprint


def test_a_tokenizer_of_hugging_face_goes_through(folder, tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    first = tmp_path / "first"
    first.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (first / name).write_bytes(tokenizer_files(folder, 64).files[name])
    found = tokenizer_files(first, 64)
    assert set(found.files) == {"tokenizer.json", "tokenizer_config.json"}
    assert found.tokens == {"bos": 1, "eos": 2, "pad": 2}


def test_what_a_tokenizer_json_cannot_say_is_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    with open(tmp_path / "tokenizer.model", "wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["alpha beta gamma"] * 20), model_writer=model, vocab_size=20, model_type="char"
        )
    with pytest.raises(UserError, match="neither a BPE nor a unigram"):
        tokenizer_files(tmp_path, 64)
