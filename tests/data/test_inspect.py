"""Inspection: the statistics are right, damage is found, and the commands say it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ling.cli import main
from ling.config.errors import UserError
from ling.data.index_file import read_index
from ling.data.inspect import first_documents, statistics, unigram_entropy


def test_statistics(prefix, texts, tokenizer):
    documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    counts = Counter(token for document in documents for token in document)
    total = sum(counts.values())
    found = statistics(prefix, tokenizer)
    assert (found.documents, found.tokens, found.ids_used) == (len(texts), total, len(counts))
    assert (found.shortest, found.longest) == (min(map(len, documents)), max(map(len, documents)))
    assert sum(found.length_histogram.values()) == len(texts)
    assert found.length_histogram["64-127"] == sum(64 <= len(document) < 128 for document in documents)
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert found.unigram_entropy == pytest.approx(entropy, rel=1e-12)
    assert unigram_entropy(prefix) == found.unigram_entropy


def test_blocks_add_up(prefix, monkeypatch):
    whole = unigram_entropy(prefix)
    monkeypatch.setattr("ling.data.inspect.BLOCK_TOKENS", 100)
    assert unigram_entropy(prefix) == whole


def test_first_documents(prefix, texts, tokenizer):
    assert first_documents(prefix, tokenizer, 3) == texts[:3]


def test_damage_is_found(tmp_path, prefix):
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"copy{suffix}").write_bytes(Path(prefix + suffix).read_bytes())
    copy = str(tmp_path / "copy")
    index = read_index(copy)
    idx = bytearray(Path(copy + ".idx").read_bytes())
    idx[34 + 4 * 5] += 1  # the length of document 5
    Path(copy + ".idx").write_bytes(idx)
    with pytest.raises(UserError, match="document 6 does not follow"):
        statistics(copy)
    idx = bytearray(Path(prefix + ".idx").read_bytes())
    idx[-8] ^= 1  # the last document mark
    Path(copy + ".idx").write_bytes(idx)
    with pytest.raises(UserError, match="document marks do not count"):
        statistics(copy)
    Path(copy + ".idx").write_bytes(Path(prefix + ".idx").read_bytes() + bytes(8))
    with pytest.raises(UserError, match="longer than it says"):
        statistics(copy)
    Path(copy + ".idx").write_bytes(Path(prefix + ".idx").read_bytes())
    tokens = np.array(index.tokens)
    tokens[index.lengths[:3].sum() - 1] = 7
    Path(copy + ".bin").write_bytes(tokens.tobytes())
    with pytest.raises(UserError, match="document 2 has no end token"):
        statistics(copy)
    tokens = np.array(read_index(prefix).tokens)
    tokens[4] = 60_000
    Path(copy + ".bin").write_bytes(tokens.tobytes())
    with pytest.raises(UserError, match="token id 60000, its tokenizer 320 tokens"):
        statistics(copy)


def test_commands(tmp_path, jsonl, capsys):
    tokenizer, output = str(tmp_path / "tok"), str(tmp_path / "out" / "data")
    assert main(["tokenizer", "train", "--input", str(jsonl), "--vocab-size", "300", "--output", tokenizer]) == 0
    assert "300 tokens, bpe" in capsys.readouterr().out
    prepare = ["data", "prepare", "--input", str(jsonl), "--tokenizer", tokenizer, "--output", output]
    assert main(prepare) == 0
    assert "300 documents" in capsys.readouterr().out
    assert main(prepare) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["data", "inspect", output, "--tokenizer", tokenizer, "--documents", "1"]) == 0
    shown = capsys.readouterr().out
    assert "unigram entropy" in shown
    assert "Document 0: " in shown
    assert main(["data", "inspect", output, output, "--json"]) == 0
    assert [json.loads(line)["documents"] for line in capsys.readouterr().out.splitlines()] == [300, 300]
    assert main(["data", "inspect", output, "--documents", "1"]) == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_bad_lines_are_shown(tmp_path, tokenizer_dir, capsys):
    source = tmp_path / "bad.jsonl"
    source.write_text('{"text": "good"}\n' + "oops\n" * 12)
    words = [
        "data",
        "prepare",
        "--input",
        str(source),
        "--tokenizer",
        str(tokenizer_dir),
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(words) == 2
    assert "bad.jsonl:2: not JSON" in capsys.readouterr().err
    assert main([*words, "--on-error", "skip"]) == 0
    said = capsys.readouterr()
    assert "1 documents" in said.out
    assert "12 bad" in said.out
    assert [line.split()[0] for line in said.err.splitlines()] == ["skipped"] * 11
    assert "skipped 2 more" in said.err
    listed = (tmp_path / "o.skipped.txt").read_text().splitlines()
    assert [int(line.split("bad.jsonl:")[1].split(":")[0]) for line in listed] == list(range(2, 14))
