import json
import math
import os

import numpy as np
import pytest
import torch

from ling.observe import metrics
from ling.observe.metrics import open_metrics, read_metrics


def steps(run_dir, resume_step, numbers):
    file = open_metrics(run_dir, resume_step)
    for number in numbers:
        file.write({"step": number, "loss": 1.0 / number})
    file.close()
    return file.attempt


def superseded(run_dir):
    path = run_dir / "metrics.superseded.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_fresh_run_is_attempt_1(tmp_path):
    assert steps(tmp_path / "new", 0, [1, 2]) == 1
    assert read_metrics(tmp_path / "new") == [
        {"step": 1, "loss": 1.0, "attempt": 1},
        {"step": 2, "loss": 0.5, "attempt": 1},
    ]
    assert superseded(tmp_path / "new") == []


def test_no_file_is_no_record(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    file = open_metrics(tmp_path, 0)
    file.write({"step": 1})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    file.close()
    file.close()


def test_resume_moves_the_later_lines_and_counts_attempts(tmp_path):
    steps(tmp_path, 0, range(1, 6))
    file = open_metrics(tmp_path, 3)
    file.write({"step": 3, "eval": {"valid": 2.5}})
    file.close()
    assert file.attempt == 2
    assert steps(tmp_path, 3, [4]) == 3
    assert [(record["step"], record["attempt"]) for record in read_metrics(tmp_path)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (3, 2),
        (4, 3),
    ]
    assert [(record["step"], record["attempt"]) for record in superseded(tmp_path)] == [(4, 1), (5, 1)]


def test_the_attempt_counts_on_when_every_line_was_superseded(tmp_path):
    steps(tmp_path, 0, [1, 2])
    assert steps(tmp_path, 0, [1]) == 2
    assert steps(tmp_path, 0, []) == 3
    assert steps(tmp_path, 0, [1]) == 3  # an attempt that wrote nothing leaves no trace
    assert [record["attempt"] for record in superseded(tmp_path)] == [1, 1, 2]


@pytest.mark.parametrize("half", [b'{"step": 3, "lo', b'{"step": 3, "x": "\xc3', b"[1, 2]\n", b'{"step": 3}garbage\n'])
def test_a_half_line_is_dropped_into_superseded(tmp_path, half):
    steps(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(half)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert steps(tmp_path, 2, [3]) == 2
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert [list(record) for record in superseded(tmp_path)] == [["torn"]]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")


def test_a_line_that_lacks_only_its_newline_is_kept(tmp_path):
    steps(tmp_path, 0, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    steps(tmp_path, 2, [3])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert superseded(tmp_path) == []


def test_resuming_without_later_lines_leaves_the_file_alone(tmp_path):
    steps(tmp_path, 0, [1, 2])
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    steps(tmp_path, 2, [3])
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_a_crash_anywhere_in_the_move_loses_and_doubles_nothing(tmp_path, monkeypatch):
    """Cut the move off after each of its writes, at every byte of the superseded file, and open again."""
    steps(tmp_path, 0, range(1, 7))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"st')
    before = (tmp_path / "metrics.jsonl").read_bytes()
    steps(tmp_path, 3, [])
    kept, moved = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "metrics.superseded.jsonl").read_bytes()
    for size in range(len(moved) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(before)
        (tmp_path / "metrics.superseded.jsonl").write_bytes(moved[:size])
        (tmp_path / "metrics.jsonl.tmp").write_bytes(kept[: size % len(kept)])
        steps(tmp_path, 3, [])
        assert (tmp_path / "metrics.jsonl").read_bytes() == kept
        assert (tmp_path / "metrics.superseded.jsonl").read_bytes() == moved

    (tmp_path / "metrics.jsonl").write_bytes(before)
    monkeypatch.setattr(metrics, "_replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_metrics(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before, "nothing leaves before it has arrived"


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path):
    file = open_metrics(tmp_path, 0)
    file.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "eval": {"a": -math.inf}, "list": [math.nan, 1]})
    file.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    raw = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (raw["loss"], raw["grad_norm"], raw["eval"]["a"]) == ("nan", "inf", "-inf")
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"])
    assert (record["grad_norm"], record["eval"]["a"]) == (math.inf, -math.inf)


def test_tensors_and_arrays_become_numbers(tmp_path):
    file = open_metrics(tmp_path, 0)
    file.write({"a": torch.tensor(1.5), "b": np.float32(0.5), "c": np.arange(2), "d": True, "e": None, "f": tmp_path})
    file.close()
    (record,) = read_metrics(tmp_path)
    assert record == {"a": 1.5, "b": 0.5, "c": [0, 1], "d": True, "e": None, "f": str(tmp_path), "attempt": 1}


def test_a_line_written_in_part_does_not_spoil_the_next(tmp_path):
    class FullDisk:
        def write(self, line):
            return os.write(real.fileno(), line[:5])

    file = open_metrics(tmp_path, 0)
    file.write({"step": 1})
    real, file._file = file._file, FullDisk()
    with pytest.raises(OSError, match="in part only"):
        file.write({"step": 2})
    file._file = real
    file.write({"step": 3})
    file.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]
