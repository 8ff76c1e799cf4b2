"""`ling checkpoint` from the outside."""

import json
import re
import shutil
import subprocess

import pytest

from ling.checkpoint.folder import checkpoints, read_manifest, set_aside
from ling.cli import main
from tests.checkpoint.files import flip_a_byte, make_run, mounted


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "run", [2, 4, 6, 8])
    return tmp_path / "run"


def ling(*words) -> int:
    return main(["checkpoint", *map(str, words)])


def test_list(run, capsys):
    (run / "checkpoints" / "step_00000008" / "__0_0.distcp").write_bytes(b"")
    (run / "checkpoints" / "step_00000006" / "manifest.json").unlink()
    set_aside(run / "checkpoints" / "step_00000002")
    assert ling("list", run) == 0
    aside, header, *rows = capsys.readouterr().out.splitlines()
    assert aside == "set aside as damaged: step_00000002.damaged"
    assert header.split() == ["step", "size", "layout", "loss", "age", "state"]
    assert [row.split()[0] for row in rows] == ["4", "6", "8"]
    assert "1 rank" in rows[0]
    assert rows[0].endswith("complete")
    assert "it has no manifest.json" in rows[1]
    assert "__0_0.distcp has 0 bytes" in rows[2]
    assert ling("list", run, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["problem"] is None) for row in found] == [(4, True), (6, False), (8, False)]
    assert found[0]["bytes"] == read_manifest(run / "checkpoints" / "step_00000004").bytes
    assert found[0]["has_optimizer"] is True


def test_list_of_nothing(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert ling("list", tmp_path / "run") == 0
    assert "has no checkpoints yet" in capsys.readouterr().out
    (folder,) = make_run(tmp_path / "run", [2]).values()
    set_aside(folder)
    assert ling("list", tmp_path / "run") == 0
    assert capsys.readouterr().out.splitlines()[1] == f"{tmp_path / 'run'} has no good checkpoint left"
    assert ling("list", tmp_path) == 2
    assert "is no run's folder" in capsys.readouterr().err


def test_verify(run, capsys):
    folder = run / "checkpoints" / "step_00000008"
    assert ling("verify", folder) == 0
    assert "5 files are whole" in capsys.readouterr().out
    assert ling("verify", run) == 0
    assert str(folder) in capsys.readouterr().out
    flip_a_byte(folder / "__0_0.distcp")
    (folder / "common.pt").unlink()
    assert ling("verify", folder) == 1
    out = capsys.readouterr().out
    assert "damaged: __0_0.distcp has the checksum" in out
    assert "damaged: common.pt is missing" in out
    assert "2 of 5 files are damaged" in out
    (folder / "manifest.json").write_text("")
    assert ling("verify", folder) == 1
    shutil.rmtree(folder)
    assert ling("verify", folder) == 2
    assert "does not exist" in capsys.readouterr().err


def test_prune(run, capsys):
    arguments = ("prune", run, "--keep-last", 1, "--keep-every", 4)
    assert ling(*arguments, "--dry-run") == 0
    assert "would remove 2 of 4 checkpoints: step_00000002, step_00000006" in capsys.readouterr().out
    assert len(checkpoints(run)) == 4
    assert ling(*arguments) == 0
    assert "removed 2 of 4" in capsys.readouterr().out
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000004", "step_00000008"]
    assert ling(*arguments) == 0
    assert "nothing to remove, 2 checkpoints stay" in capsys.readouterr().out


def test_prune_removes_nothing_for_a_damaged_newest_one(run, capsys):
    flip_a_byte(run / "checkpoints" / "step_00000008" / "__0_0.distcp")
    assert ling("prune", run, "--keep-last", 1) == 2
    assert "step_00000008 is damaged" in capsys.readouterr().err
    assert len(checkpoints(run)) == 4


def test_a_disk_that_cannot_be_written(tmp_path, capsys):
    with mounted(tmp_path / "disk", "size=4m") as disk:
        found = list(make_run(disk / "run", [2, 4]).values())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert ling("prune", disk / "run", "--keep-last", 1) == 2
        assert re.search("error: .*step_00000002: Read-only file system; see to that disk", capsys.readouterr().err)
        assert ling("merge", *found, "--output", disk / "merged") == 2
        assert re.search("error: .*merged.*: Read-only file system; see to that disk", capsys.readouterr().err)
        assert ling("list", disk / "run") == ling("verify", disk / "run") == 0


def test_merge(run, tmp_path, capsys):
    import torch

    from ling.checkpoint.torch_dist import Reader

    folders = [path for _, path in checkpoints(run)]
    assert ling("merge", *reversed(folders), "--output", tmp_path / "merged") == 0
    out = capsys.readouterr().out
    assert out.count("0.250000") == 4
    assert torch.equal(Reader(tmp_path / "merged").read("weight"), torch.full((8, 32), 5.0))
    assert read_manifest(tmp_path / "merged").step == 8
    weighted = ("--output", tmp_path / "weighted", "--weights", 0.75, 0.25)
    assert ling("merge", *folders[:2], *weighted) == 0
    assert torch.equal(Reader(tmp_path / "weighted").read("weight"), torch.full((8, 32), 2.5))
    assert ling("merge", *folders[:2], "--output", tmp_path / "x", "--weights", 1) == 2
    assert ling("merge", folders[0], "--output", tmp_path / "x") == 2
    assert "two checkpoints or more" in capsys.readouterr().err
