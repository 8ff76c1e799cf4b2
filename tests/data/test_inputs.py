"""What can be prepared: every format gives the same documents; folders, globs, standard input; damage is named."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from ling.config.errors import UserError
from ling.data import inputs
from ling.data.inputs import Input, find_inputs
from ling.data.prepare import prepare
from ling.data.records import record_text, records_of
from tests.data.conftest import write_jsonl
from tests.data.test_prepare import documents_of

TEXTS = ["One.\nMore", "é 漢字", "Three"]


def jsonl_bytes(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(source: Input, **options) -> list[str]:
    return [
        record_text(record, block.documents is None, "text")[0]
        for block in source.blocks("text", **options)
        for record in records_of(block)
    ]


def write_zst(path: Path, content: bytes, frames: int = 1) -> Path:
    zstandard = pytest.importorskip("zstandard")
    size = -(-len(content) // frames)
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in parts))
    return path


def write_parquet(path: Path, texts: list[str | None]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"text": pyarrow.array(texts, pyarrow.string()), "number": list(range(len(texts)))}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "two frames", "parquet", "stdin"])
def test_every_format_gives_the_same_documents(tmp_path, tokenizer_dir, tokenizer, monkeypatch, kind):
    content = jsonl_bytes(TEXTS)
    if kind == "stdin":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        source = "-"
    elif kind == "parquet":
        source = write_parquet(tmp_path / "a.parquet", TEXTS)
    elif kind in ("zst", "two frames"):
        source = write_zst(tmp_path / "a.jsonl.zst", content, 1 + (kind == "two frames"))
    else:
        source = tmp_path / ("a.jsonl.gz" if kind == "gz" else "a.jsonl")
        source.write_bytes(gzip.compress(content) if kind == "gz" else content)
    prepare([source], tokenizer_dir, tmp_path / "out")
    assert documents_of(tmp_path / "out", tokenizer) == TEXTS
    side = json.loads((tmp_path / "out.json").read_text())
    assert side["sources"][0]["bytes"] == (len(content) if kind == "stdin" else source.stat().st_size)


def test_folders_and_globs_are_sorted(tmp_path):
    for name in (
        "b/2.jsonl",
        "a.txt",
        "b/1.jsonl.gz",
        ".hidden.jsonl",
        "b/.git/x.txt",
        "b/web.json",
        "readme.md",
        "c.txt.zst",
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = tmp_path / "in"
    names = [(str(source.path.relative_to(folder)), source.format) for source in find_inputs([folder])]
    assert names == [("a.txt", "text"), ("b/1.jsonl.gz", "jsonl"), ("b/2.jsonl", "jsonl"), ("c.txt.zst", "text")]
    found = find_inputs([folder / "readme.md", f"{folder}/b/*.jsonl*"])
    assert [source.path.name for source in found] == ["readme.md", "1.jsonl.gz", "2.jsonl"]
    assert [source.format for source in find_inputs([folder / "a.txt"], "jsonl")] == ["jsonl"]
    assert len(find_inputs([f"{folder}/**/*.jsonl"])) == 1


def test_lines_are_counted_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 50)
    texts = [f"document {i}" * (i % 5) for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    blocks = list(Input(path, "jsonl").blocks("text"))
    assert len(blocks) > 10
    records = [record for block in blocks for record in records_of(block)]
    assert [record.line for record in records] == list(range(1, 41))
    assert read(Input(path, "jsonl")) == texts
    plain = tmp_path / "a.txt"
    plain.write_text("\n***\n".join(texts) + "\n")
    assert list(filter(None, read(Input(plain, "text"), separator=r"\*+"))) == list(filter(None, texts))


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl_bytes(["x"]))
    assert read(Input(path, "jsonl")) == ["x"]


def test_records_without_end_do_not_fill_the_memory(tmp_path, tokenizer_dir, tokenizer, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_RECORD_BYTES", 300)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl_bytes(["good", "x" * 1000, "also good", "y" * 150]))
    counts = prepare([path], tokenizer_dir, tmp_path / "out", on_error="skip")
    assert documents_of(tmp_path / "out", tokenizer) == ["good", "also good", "y" * 150]
    assert counts.bad == [f"{path}:2: longer than 0 MiB"]
    plain = tmp_path / "a.txt"
    plain.write_text("short\n\n" + "long\n" * 100 + "\nlast")
    with pytest.raises(UserError, match=r"a.txt:1: longer than .*--document-separator"):
        prepare([plain], tokenizer_dir, tmp_path / "two")
    counts = prepare([plain], tokenizer_dir, tmp_path / "two", separator="", on_error="skip")
    assert documents_of(tmp_path / "two", tokenizer) == ["short", "last"]
    assert counts.bad == [f"{plain}:3: longer than 0 MiB"]


def test_parquet_rows_without_text(tmp_path, tokenizer_dir, tokenizer):
    path = write_parquet(tmp_path / "a.parquet", ["x", None, "", "y"])
    with pytest.raises(UserError, match=r"a.parquet:2: no text in the row"):
        prepare([path], tokenizer_dir, tmp_path / "out")
    counts = prepare([path], tokenizer_dir, tmp_path / "out", on_error="skip")
    assert (counts.bad_records, counts.empty_documents) == (1, 1)
    assert documents_of(tmp_path / "out", tokenizer) == ["x", "y"]
    for field, said in (("body", r"no column 'body' \(columns: text, number\)"), ("number", "holds int64 and no text")):
        with pytest.raises(UserError, match=said):
            prepare([path], tokenizer_dir, tmp_path / "other", field=field)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="no readable Parquet file"):
        prepare([path], tokenizer_dir, tmp_path / "other")


def test_broken_zstd(tmp_path, tokenizer_dir):
    path = write_zst(tmp_path / "a.jsonl.zst", jsonl_bytes(TEXTS * 50))
    whole = path.read_bytes()
    for content, said in ((whole[:-9], "it ends too early"), (b"something else", "not a whole zstd file")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            prepare([path], tokenizer_dir, tmp_path / "out")


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_missing_packages_are_named(tmp_path, tokenizer_dir, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs the package `{package}`: pip install {package}"):
        prepare([tmp_path / name], tokenizer_dir, tmp_path / "out")
