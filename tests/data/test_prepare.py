"""Preparation: megatron-core reads it, every document is there, workers change nothing, nothing is half-written."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from ling.config.errors import UserError
from ling.data.index_file import check_prefix, read_index
from ling.data.inputs import BLOCK_BYTES, Input
from ling.data.prepare import Progress, prepare
from ling.data.records import records_of

SUFFIXES = (".bin", ".idx", ".json")


def documents_of(prefix, tokenizer) -> list[str]:
    index = read_index(str(prefix))
    ends = np.cumsum(index.lengths)
    ids = np.split(index.tokens, ends[:-1])
    assert all(document[-1] == tokenizer.eos_id for document in ids)
    return [tokenizer.decode(document[:-1].tolist()) for document in ids]


def test_megatron_core_reads_every_document(prefix, texts, tokenizer):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs, ours = IndexedDataset(prefix), read_index(prefix)
    assert len(theirs) == len(texts) == ours.num_documents
    assert theirs.document_indices.tolist() == list(range(len(texts) + 1))
    assert theirs[0].dtype == ours.tokens.dtype == np.uint16
    for number, text in enumerate(texts):
        assert theirs[number].tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    np.testing.assert_array_equal(np.concatenate([theirs[i] for i in range(len(texts))]), ours.tokens)


def test_side_file_tells_where_it_comes_from(prefix, jsonl, texts, tokenizer):
    side = json.loads(Path(prefix + ".json").read_text())
    assert side["documents"] == len(texts)
    assert side["tokens"] == read_index(prefix).num_tokens
    assert side["bytes"] == sum(len(text.encode()) for text in texts)
    assert side["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert side["sources"][0]["sha256"] == hashlib.sha256(jsonl.read_bytes()).hexdigest()


def test_output_does_not_depend_on_workers(tmp_path, tokenizer_dir):
    source = tmp_path / "many.jsonl"
    count = 3 * BLOCK_BYTES // 80
    source.write_text("".join(json.dumps({"text": f"number {i} " * (i % 7 * 3)}) + "\n" for i in range(count)))
    assert source.stat().st_size > 2 * BLOCK_BYTES
    counts = [prepare([source], tokenizer_dir, tmp_path / f"w{n}", workers=n) for n in (1, 2)]
    assert counts[0] == counts[1]
    assert counts[0].empty_documents == -(-count // 7)
    for suffix in SUFFIXES:
        assert (tmp_path / f"w1{suffix}").read_bytes() == (tmp_path / f"w2{suffix}").read_bytes()


def test_text_files_gzip_and_separators(tmp_path, tokenizer_dir, tokenizer):
    whole = tmp_path / "whole.txt"
    whole.write_text("One\n\ndocument.\n")
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"body": "Packed."}).encode()))
    prepare([whole, packed], tokenizer_dir, tmp_path / "a", field="body")
    assert documents_of(tmp_path / "a", tokenizer) == ["One\n\ndocument.\n", "Packed."]
    side = json.loads((tmp_path / "a.json").read_text())
    assert side["sources"][1]["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()

    many = tmp_path / "many.txt"
    many.write_text("One\nmore\n***\n\n***\nTwo\n")
    counts = prepare([many], tokenizer_dir, tmp_path / "b", separator=r"\*+")
    assert documents_of(tmp_path / "b", tokenizer) == ["One\nmore", "Two"]
    assert counts.empty_documents == 1
    (block,) = Input(many, "text").blocks("text", "")
    assert [record.line for record in records_of(block)] == [1, 5]


def test_bytes_that_are_no_text_are_mended_and_counted(tmp_path, tokenizer_dir, tokenizer):
    source = tmp_path / "odd.jsonl"
    source.write_bytes(b'{"text": "a\xffb"}\n{"text": "c\\ud800d"}\n{"text": "\\ud83d\\ude00"}\n')
    counts = prepare([source], tokenizer_dir, tmp_path / "out")
    assert counts.mended_documents == 2
    assert documents_of(tmp_path / "out", tokenizer) == ["a\ufffdb", "c\ufffdd", "\U0001f600"]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_stop_or_are_skipped(tmp_path, tokenizer_dir, tokenizer, workers):
    source = tmp_path / "bad.jsonl"
    source.write_text('{"text": "good"}\n\n{"text": \n[1]\n{"text": 3}\n{"text": "also good"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:3: not JSON .*--on-error skip"):
        prepare([source], tokenizer_dir, tmp_path / "out", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    counts = prepare([source], tokenizer_dir, tmp_path / "out", workers=workers, on_error="skip")
    assert documents_of(tmp_path / "out", tokenizer) == ["good", "also good"]
    assert counts.bad_records == 3
    assert [line.split(": ")[0].rsplit(":")[-1] for line in counts.bad] == ["3", "4", "5"]


def test_wide_vocabularies_take_four_bytes(tmp_path, jsonl, tokenizer, monkeypatch):
    monkeypatch.setattr("ling.data.prepare.load_tokenizer", lambda path: _widened(tokenizer))
    prepare([jsonl], "wide", tmp_path / "wide")
    assert read_index(str(tmp_path / "wide")).dtype == np.int32


def _widened(tokenizer):
    tokenizer = type(tokenizer)(tokenizer.path)
    tokenizer.vocab_size = 70_000
    return tokenizer


def test_wrong_input_leaves_nothing(tmp_path, tokenizer_dir, jsonl, prefix):
    def refused(said, inputs, output="out", **options):
        with pytest.raises(UserError, match=said) as raised:
            prepare(inputs, options.pop("tokenizer", tokenizer_dir), tmp_path / output, **options)
        assert "\n" not in str(raised.value)
        assert not [path for path in tmp_path.rglob("*out*") if path.is_file()]

    refused("no input files", [])
    refused("no such file", [tmp_path / "none.txt"])
    (tmp_path / "folder").mkdir()
    refused("is a folder: name its files.*none of them is .jsonl, .ndjson, .txt", [tmp_path / "folder"])
    refused("no file matches", [tmp_path / "*.jsonl"])
    refused("named twice", [jsonl, jsonl])
    refused("is not read", [_touch(tmp_path / "a.zip")])
    refused("--format csv: choose", [jsonl], input_format="csv")
    refused("share of the documents between", [jsonl], split={"valid": 1.5})
    refused("leave some for train", [jsonl], split={"valid": 0.5, "test": 0.5})
    refused("a name such as valid", [jsonl], split={"train": 0.5})
    refused("--split-seed -1", [jsonl], split_seed=-1)
    refused("give 1 or more", [jsonl], workers=0)
    refused("stop, skip", [jsonl], on_error="ask")
    refused("no regular expression", [jsonl], separator="(")
    refused("no such file or folder", [jsonl], tokenizer=tmp_path / "none")
    refused("no document with text", [_touch(tmp_path / "empty.txt")])
    refused("no text in the field 'body'", [jsonl], field="body")
    truncated = tmp_path / "cut.txt.gz"
    truncated.write_bytes(gzip.compress(jsonl.read_bytes())[:-20])
    refused("not a whole gzip file", [truncated])
    with pytest.raises(UserError, match="exists already"):
        prepare([jsonl], tokenizer_dir, prefix)


def _touch(path):
    path.touch()
    return path


def test_progress_shows_rate_and_time_left(monkeypatch):
    now = iter([0.0, 1.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    shown = io.StringIO()
    line = Progress(2**21, shown)
    line.update(1, 10)
    line.update(2**19, 4000)
    assert shown.getvalue() == " 25.0% of 2.0 MiB, 200 tokens/s, 60 s left\n"


def test_damaged_files_are_recognised(tmp_path, prefix, tokenizer):
    def copy(name) -> Path:
        for suffix in SUFFIXES:
            (tmp_path / (name + suffix)).write_bytes(Path(prefix + suffix).read_bytes())
        return tmp_path / name

    def refused(path, said, fingerprint=None):
        with pytest.raises(UserError, match=said) as raised:
            check_prefix(str(path), fingerprint)
        assert "\n" not in str(raised.value)

    assert check_prefix(str(copy("good")), tokenizer.fingerprint).num_documents == 300
    refused(copy("good"), "prepared with another tokenizer", "0" * 32)
    refused(f"{tmp_path}/good.bin", r"give the prefix without .bin")
    for suffix in (".bin", ".idx"):
        copy("missing").with_suffix(suffix).unlink()
        refused(tmp_path / "missing", f"missing{suffix} is missing")
        cut = copy("cut").with_suffix(suffix)
        cut.write_bytes(cut.read_bytes()[:-3])
        refused(tmp_path / "cut", f"cut{suffix} is truncated")
    longer = copy("longer").with_suffix(".bin")
    longer.write_bytes(longer.read_bytes() + b"xx")
    refused(tmp_path / "longer", "longer than its index")
    copy("alien").with_suffix(".idx").write_bytes(b"something else altogether, but long enough")
    refused(tmp_path / "alien", "no Megatron index")
    side = copy("mixed").with_suffix(".json")
    side.write_text(json.dumps({**json.loads(side.read_text()), "documents": 7}))
    refused(tmp_path / "mixed", "two preparations")
    side.write_text("{}")
    refused(tmp_path / "mixed", "no side file")
    side.unlink()
    check_prefix(str(tmp_path / "mixed"), "0" * 32)  # another tool's data: nothing is known


def test_no_documents(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    IndexedDatasetBuilder(str(tmp_path / "none.bin"), dtype=np.uint16).finalize(str(tmp_path / "none.idx"))
    with pytest.raises(UserError, match="no documents"):
        read_index(str(tmp_path / "none"))
