"""Whatever happens to the files: it is noticed, named and set aside, and an older checkpoint is used."""

import json

import pytest
import torch

from ling.checkpoint.folder import (
    FORMAT,
    DamagedCheckpointError,
    checkpoints,
    newest,
    read_manifest,
    set_aside,
    step_folder,
)
from ling.checkpoint.start import newest_good
from ling.checkpoint.torch_dist import Reader
from ling.config import UserError
from tests.checkpoint.files import flip_a_byte, make_run


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()


DAMAGES = {
    "truncated tensors": ("__0_0.distcp", truncate, "__0_0.distcp has .* bytes, not"),
    "flipped tensors": ("__0_0.distcp", flip_a_byte, "__0_0.distcp has the checksum"),
    "deleted tensors": ("__0_0.distcp", delete, "__0_0.distcp is missing"),
    "flipped index": (".metadata", flip_a_byte, ".metadata has the checksum"),
    "empty index": (".metadata", empty, ".metadata has 0 bytes"),
    "flipped tokenizer": ("tokenizer/tokenizer.txt", flip_a_byte, "tokenizer.txt has the checksum"),
    "empty manifest": ("manifest.json", empty, "is damaged: manifest.json: "),
    "deleted manifest": ("manifest.json", delete, "it has no manifest.json"),
    "truncated manifest": ("manifest.json", truncate, "is damaged: manifest.json: "),
    "flipped manifest": ("manifest.json", flip_a_byte, "is damaged: manifest.json: "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, name):
    file, harm, message = DAMAGES[name]
    found = make_run(tmp_path, [2, 4, 6])
    harm(found[6] / file)
    with pytest.raises(DamagedCheckpointError, match=message):
        read_manifest(found[6], "always")
    said: list[str] = []
    assert newest_good(tmp_path, "always", said.append) == found[4]
    assert len(said) == 1
    assert said[0].startswith(f"warning: {found[6]} is damaged: ")
    assert said[0].endswith("kept as step_00000006.damaged")
    assert (tmp_path / "checkpoints" / "step_00000006.damaged").is_dir()
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4]
    assert newest_good(tmp_path, "always", said.append) == found[4]
    assert len(said) == 1


def test_sizes_alone_do_not_see_a_flipped_byte(tmp_path):
    found = make_run(tmp_path, [2])
    flip_a_byte(found[2] / "__0_0.distcp")
    assert newest_good(tmp_path, "manifest", print) == found[2]
    truncate(found[2] / "__0_0.distcp")
    assert newest_good(tmp_path, "never", print) == found[2]
    with pytest.raises(UserError, match="no good checkpoint left"):
        newest_good(tmp_path, "manifest", print)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    found = make_run(tmp_path, [2, 4])
    for folder in found.values():
        delete(folder / "__0_0.distcp")
    for _ in range(2):  # the next start finds them set aside already
        with pytest.raises(UserError, match="no good checkpoint left, only step_0000000.*; give another run.dir"):
            newest_good(tmp_path, "always", lambda text: None)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2, "nothing is lost"


def test_what_was_set_aside_before_is_not_overwritten(tmp_path):
    make_run(tmp_path, [2])
    assert set_aside(step_folder(tmp_path, 2)).name == "step_00000002.damaged"
    make_run(tmp_path, [2])
    assert set_aside(step_folder(tmp_path, 2)).name == "step_00000002.damaged2"


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest_good(tmp_path, "always", print) is None
    assert newest(tmp_path) is None


def test_half_written_checkpoints_are_none(tmp_path):
    make_run(tmp_path, [2])
    (tmp_path / "checkpoints" / ".step_00000004.partial").mkdir()
    assert newest_good(tmp_path, "always", print) == step_folder(tmp_path, 2)


def test_the_step_orders_them_not_the_clock(tmp_path):
    found = make_run(tmp_path, [2, 10, 6])  # each saved "before" the one before it
    assert read_manifest(found[10]).saved_at < read_manifest(found[2]).saved_at
    assert newest(tmp_path) == found[10]
    assert newest_good(tmp_path, "always", print) == found[10]
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 6, 10]


def test_a_newer_format_is_no_damage(tmp_path):
    found = make_run(tmp_path, [2, 4])
    manifest = json.loads((found[4] / "manifest.json").read_text())
    manifest |= {"format": FORMAT + 1, "unknown": 1}
    (found[4] / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"format {FORMAT + 1}, this ling reads up to {FORMAT}; upgrade ling"):
        newest_good(tmp_path, "always", print)
    assert found[4].is_dir()


def test_a_missing_box_is_noticed(tmp_path):
    (folder,) = make_run(tmp_path, [2]).values()
    reader = Reader(folder)
    info = reader.tensors["weight"]
    reader.tensors["weight"] = info._replace(chunks=[])
    with pytest.raises(DamagedCheckpointError, match="parts of weight are missing"):
        reader.read("weight")
    assert torch.equal(Reader(folder).read("weight"), torch.full((8, 32), 2.0))


def test_what_a_later_ling_adds_to_the_manifest_does_not_disturb(tmp_path):
    from ling.checkpoint import folder as module

    (path,) = make_run(tmp_path, [2]).values()
    manifest = json.loads((path / "manifest.json").read_text()) | {"weather": "fine"}
    manifest.pop("crc32")
    manifest["crc32"] = module._own_crc32(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(path, "always").step == 2
