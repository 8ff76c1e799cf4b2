"""Interrupted preparations go on; duplicates and splits are exact; and nothing of it depends on workers."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from ling.config.errors import UserError
from ling.data import assemble, spool
from ling.data import prepare as module
from ling.data.assemble import choose, split_value
from ling.data.index_file import check_prefix, read_index
from ling.data.prepare import prepare
from tests.data.conftest import make_texts, write_jsonl
from tests.data.test_prepare import documents_of


def contents(folder: Path, stem: str) -> dict[str, bytes]:
    """The files of an output, by what follows the stem."""
    return {path.name.removeprefix(stem): path.read_bytes() for path in folder.iterdir() if path.name.startswith(stem)}


@pytest.fixture
def files(tmp_path) -> list[Path]:
    (tmp_path / "in").mkdir()
    return [write_jsonl(tmp_path / "in" / f"{i}.jsonl", make_texts(40 if i != 2 else 0, seed=i)) for i in range(4)]


def test_goes_on_behind_the_last_whole_input(tmp_path, tokenizer_dir, files, monkeypatch):
    prepare(files, tokenizer_dir, tmp_path / "whole")
    good = files[3].read_bytes()
    files[3].write_bytes(good + b"oops\n")
    with pytest.raises(UserError, match=r"3.jsonl:41: not JSON"):
        prepare(files, tokenizer_dir, tmp_path / "out", workers=2)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == [".out.partial"]
    files[3].write_bytes(good)
    seen = []
    encode = module._encode
    monkeypatch.setattr(
        module, "_encode", lambda task, *rest: seen.append(Path(task.block.path)) or encode(task, *rest)
    )
    prepare(files, tokenizer_dir, tmp_path / "out")
    assert seen == [files[3]]
    assert contents(tmp_path, "out") == contents(tmp_path, "whole")
    assert not (tmp_path / ".out.partial").exists()


def test_a_killed_preparation_goes_on(tmp_path, tokenizer_dir, files):
    os.mkfifo(tmp_path / "pipe.jsonl")  # the reader waits for a writer that never comes
    program = "import sys; from ling.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["data", "prepare", "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "out"), "--workers", "1"]
    command = [sys.executable, "-c", program, *words, "--input", *map(str, files), str(tmp_path / "pipe.jsonl")]
    patched = "import ling.data.spool; ling.data.spool.SYNC_SECONDS = -1; "
    command[2] = patched + program
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        journal = tmp_path / ".out.partial" / "journal.jsonl"
        for _ in range(300):
            if journal.exists() and journal.read_bytes().count(b"\n") == 3:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert journal.read_bytes().count(b"\n") == 3  # the third is complete once the fourth has given a block
    with open(tmp_path / ".out.partial" / "tokens.bin", "ab") as file:
        file.write(b"half a block")
    with open(journal, "ab") as file:
        file.write(b'{"half": ')
    prepare(files, tokenizer_dir, tmp_path / "out")
    prepare(files, tokenizer_dir, tmp_path / "whole")
    assert contents(tmp_path, "out") == contents(tmp_path, "whole")


def test_changed_inputs_are_read_again(tmp_path, tokenizer_dir, tokenizer, files):
    stop(tmp_path, tokenizer_dir, files)
    write_jsonl(files[1], ["changed"])
    prepare(files, tokenizer_dir, tmp_path / "out")
    assert documents_of(tmp_path / "out", tokenizer)[40] == "changed"


def test_other_inputs_of_the_same_size_and_time_are_read(tmp_path, tokenizer_dir, tokenizer, files):
    for path, word in zip(files, ("one", "two", "six", "ten"), strict=True):
        write_jsonl(path, [word])
        os.utime(path, ns=(1, 1))
    stop(tmp_path, tokenizer_dir, files)
    assert len({path.stat().st_size for path in files}) == 1
    prepare([files[2], files[0], files[1]], tokenizer_dir, tmp_path / "out")
    assert documents_of(tmp_path / "out", tokenizer) == ["six", "one", "two"]


def stop(tmp_path: Path, tokenizer_dir: Path, files: list[Path]) -> None:
    """Leave an unfinished preparation of all but the last file."""
    good = files[3].read_bytes()
    files[3].write_bytes(b"oops\n")
    with pytest.raises(UserError, match="not JSON"):
        prepare(files, tokenizer_dir, tmp_path / "out")
    files[3].write_bytes(good)


def test_other_settings_do_not_mix(tmp_path, tokenizer_dir, files):
    stop(tmp_path, tokenizer_dir, files)
    with pytest.raises(UserError, match=r"unfinished preparation with other settings \(field\)"):
        prepare(files, tokenizer_dir, tmp_path / "out", field="body")
    with pytest.raises(UserError, match=r"other settings \(deduplicate or split\)"):
        prepare(files, tokenizer_dir, tmp_path / "out", deduplicate=True)
    assert (tmp_path / ".out.partial" / "journal.jsonl").stat().st_size
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(UserError, match="out.json exists already"):
        prepare(files, tokenizer_dir, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "journal.jsonl").stat().st_size


def test_skipped_records_do_not_pass_with_stop(tmp_path, tokenizer_dir, files):
    files[0].write_bytes(b"oops\n" + files[0].read_bytes())
    packed = tmp_path / "in" / "last.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "last"}\n{}\n')[:-5])
    inputs = [*files, packed]
    with pytest.raises(UserError, match="not a whole gzip file"):
        prepare(inputs, tokenizer_dir, tmp_path / "out", on_error="skip")
    packed.write_bytes(gzip.compress(b'{"text": "last"}\n{}\n'))
    counts = prepare(inputs, tokenizer_dir, tmp_path / "out", on_error="skip")
    assert (counts.documents, counts.bad_records) == (121, 2)
    assert [line.split(": ")[0][-7:] for line in (tmp_path / "out.skipped.txt").read_text().splitlines()] == [
        "jsonl:1",
        "nl.gz:2",
    ]
    packed.write_bytes(packed.read_bytes()[:-5])
    with pytest.raises(UserError, match="not a whole gzip file"):
        prepare(inputs, tokenizer_dir, tmp_path / "two", on_error="skip")
    with pytest.raises(UserError, match=r"0.jsonl:1: not JSON"):
        prepare(inputs, tokenizer_dir, tmp_path / "two")


def test_one_process_at_a_time(tmp_path, tokenizer_dir, files):
    with spool.Spool(tmp_path / "out", {}, spool.DOCUMENT), pytest.raises(UserError, match="is in use"):
        prepare(files, tokenizer_dir, tmp_path / "out")


def test_an_interrupted_move_is_finished(tmp_path, tokenizer_dir, files, monkeypatch):
    prepare(files, tokenizer_dir, tmp_path / "whole")
    replace = os.replace

    def fails_at_the_index(source, target):
        if str(target).endswith("out.idx"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as context:
        context.setattr("os.replace", fails_at_the_index)
        with pytest.raises(UserError, match=r"out cannot be written \(Input/output error\)"):
            prepare(files, tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out.idx").exists()
    assert prepare(files, tokenizer_dir, tmp_path / "out").documents == 120
    assert contents(tmp_path, "out") == contents(tmp_path, "whole")


def test_duplicates_and_splits(tmp_path, tokenizer_dir, tokenizer, monkeypatch):
    texts = make_texts(600, seed=5)
    repeated = [*texts, *texts[:100], *texts[50:60], " "]
    source = write_jsonl(tmp_path / "in.jsonl", repeated)
    options = {"deduplicate": True, "split": {"valid": 0.2, "test": 0.1}, "split_seed": 3}
    monkeypatch.setattr(assemble, "BLOCK_DOCUMENTS", 64)
    monkeypatch.setattr(assemble, "BUCKET_DOCUMENTS", 50)
    counts = prepare([source], tokenizer_dir, tmp_path / "a", **options)
    assert (counts.documents, counts.duplicate_documents, counts.empty_documents) == (600, 110, 1)
    found = {name: documents_of(tmp_path / f"a_{name}", tokenizer) for name in ("train", "valid", "test")}
    value = {text: expected_value(text, 3) for text in texts}
    assert found["valid"] == [text for text in texts if value[text] < 0.2]
    assert found["test"] == [text for text in texts if 0.2 <= value[text] < 0.2 + 0.1]
    assert found["train"] == [text for text in texts if value[text] >= 0.2 + 0.1]
    assert 80 < len(found["valid"]) < 160
    for name, documents in found.items():
        side = json.loads((tmp_path / f"a_{name}.json").read_text())
        assert side["bytes"] == sum(len(text.encode()) for text in documents)
        assert side["options"]["split"]["name"] == name
        check_prefix(str(tmp_path / f"a_{name}"), tokenizer.fingerprint)
    monkeypatch.undo()
    prepare([source], tokenizer_dir, tmp_path / "b", workers=2, **options)
    assert contents(tmp_path, "b") == contents(tmp_path, "a")


def expected_value(text: str, seed: int) -> float:
    """SplitMix64 of the text's hash and the seed, in Python's integers."""

    def mixed(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    digest = int.from_bytes(blake2b(text.encode(), digest_size=16).digest()[:8], "little")
    return mixed(digest ^ mixed(seed)) / 2**64


def test_without_duplicates_nothing_changes(tmp_path, tokenizer_dir, jsonl, prefix):
    prepare([jsonl], tokenizer_dir, tmp_path / "a", deduplicate=True)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == Path(prefix + suffix).read_bytes()


def test_many_duplicates_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "BUCKET_DOCUMENTS", 1000)
    monkeypatch.setattr(assemble, "BLOCK_DOCUMENTS", 777)
    draw = np.random.default_rng(0)
    documents = np.zeros(20_000, spool.HASHED_DOCUMENT)
    documents["digest"] = draw.integers(2**64, size=(3000, 2), dtype=np.uint64)[draw.integers(3000, size=20_000)]
    documents["digest"][::2, 1] &= np.uint64(1)  # half a digest is not enough to be equal
    target, dropped = choose(documents, tmp_path, True, [], 0)
    keys = [tuple(digest) for digest in documents["digest"].tolist()]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    assert [bool(chosen == assemble.DROPPED) for chosen in target] == [first[key] != i for i, key in enumerate(keys)]
    assert dropped == 20_000 - len(set(keys))


def test_the_split_is_even():
    one, two = (split_value(np.arange(100_000, dtype=np.uint64), seed) for seed in (0, 1))
    assert np.abs(np.histogram(one, 10, (0, 1))[0] - 10_000).max() < 500
    assert abs(((one < 0.5) == (two < 0.5)).mean() - 0.5) < 0.02


def test_an_empty_split_is_refused(tmp_path, tokenizer_dir):
    source = write_jsonl(tmp_path / "in.jsonl", make_texts(5))
    with pytest.raises(UserError, match="valid got none of the 5 documents"):
        prepare([source], tokenizer_dir, tmp_path / "a", split={"valid": 1e-9})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("a")]
    prepare([source], tokenizer_dir, tmp_path / "a", split={"valid": 0.5})
    counts = [read_index(str(tmp_path / f"a_{name}")).num_documents for name in ("train", "valid")]
    assert sum(counts) == 5
