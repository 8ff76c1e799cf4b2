"""The files: read by megatron-core alone, equal to what was in memory, and harmless whatever they hold."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from ling.checkpoint.folder import DamagedCheckpointError, read_manifest
from ling.checkpoint.parts import RankState
from ling.checkpoint.torch_dist import METADATA, Item, Reader, _Output, write_file
from tests.checkpoint.runs import run_config, spoil, steps, weights_of
from tests.dist.training import bare_chunks, build_trainer, part_of


@pytest.mark.ranks(1)
@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_megatron_core_reads_it(tmp_path, recipe):
    from megatron.core import dist_checkpointing

    trainer = build_trainer(run_config("single", tmp_path, precision={"recipe": recipe}), tmp_path)
    steps(trainer, 1)
    folder = trainer.save()
    plain = dist_checkpointing.load_plain_tensors(str(folder))
    state = RankState(trainer.chunks, trainer.optimizer)
    parts = state.model_parts() + state.master_parts() + state.moment_parts()
    assert set(plain) == {part.key for part in parts}
    for part in parts:
        found = plain[part.key][part.box.slices()]
        assert found.dtype == part.tensor.dtype
        assert torch.equal(found, part.tensor), part.key
    assert any(key.startswith("optimizer.state.param.") for key in plain) == (recipe == "bf16")

    before = weights_of(trainer)[1]
    spoil(trainer)
    (chunk,) = bare_chunks(trainer)
    loaded = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, str(folder))
    chunk.load_state_dict(loaded["model"])
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer)[1].items())


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("saved", "loaded"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_another_precision_gets_the_most_exact_weights(tmp_path, saved, loaded):
    source = build_trainer(run_config("DP2", tmp_path, precision={"recipe": saved}), tmp_path)
    steps(source, 2)
    reader = Reader(source.save())
    target = build_trainer(run_config("DP2", tmp_path, precision={"recipe": loaded}))
    spoil(target)
    target.load(reader.folder)
    state = RankState(target.chunks, target.optimizer)
    exact = state.master_parts() if loaded == "bf16" else state.model_parts()
    assert exact
    for part in exact:
        name = part.key.removeprefix("optimizer.state.param.")
        master = f"optimizer.state.param.{name}"
        expected = reader.read(master if master in reader.tensors else name)[part.box.slices()]
        assert torch.equal(part.tensor, expected), part.key
    assert any((part.tensor != part.tensor.bfloat16()).any() for part in exact)


@pytest.mark.ranks(2)
def test_each_box_is_written_once_and_the_work_is_shared(tmp_path):
    trainer = build_trainer(run_config("DP2, whole optimizer", tmp_path), tmp_path)
    reader = Reader(trainer.save())
    by_rank = [0, 0]
    for info in reader.tensors.values():
        assert sum(box.numel for box, _ in info.chunks) == torch.Size(info.shape).numel()
        for _, stored in info.chunks:
            by_rank[int(stored.file.split("_")[2])] += stored.bytes
    assert max(by_rank) < 1.1 * min(by_rank)  # all of it is on both ranks


@pytest.mark.ranks(2)
def test_the_whole_is_read_from_its_parts(tmp_path):
    trainer = build_trainer(run_config("EP2", tmp_path), tmp_path)
    steps(trainer, 1)
    reader = Reader(trainer.save())
    place, weights = weights_of(trainer)
    for name in ("decoder.layers.1.mlp.experts.weight2", "decoder.layers.3.mlp.experts.weight2"):
        whole = reader.read(name.replace("experts.weight2", "experts.experts.linear_fc2.weight"))
        assert torch.equal(part_of(name, whole, place), weights[name])


def checkpoint(folder: Path) -> Path:
    """A folder with one tensor of 64 x 16 in one file, and the metadata of it."""
    from ling.checkpoint.torch_dist import TensorInfo, write_index

    tensor = torch.arange(1024.0).view(64, 16)
    record, (stored,) = write_file(folder / "__0_0.distcp", [Item("x", (0, 0), tensor)])
    from ling.checkpoint.boxes import whole

    write_index(folder, {"x": TensorInfo(tensor.dtype, (64, 16), [(whole((64, 16)), stored)])}, [])
    assert record.bytes == (folder / "__0_0.distcp").stat().st_size
    return folder


def test_read_and_write(tmp_path):
    assert torch.equal(Reader(checkpoint(tmp_path)).read("x"), torch.arange(1024.0).view(64, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
def test_views_are_written_without_what_surrounds_them(tmp_path, dtype):
    whole = torch.arange(1 << 12).to(dtype).view(64, 64)
    views = [whole[3:5], whole[:, 7:9], whole[10, 2:4], whole[1, 1], whole[5:5], whole.t()]
    items = [Item(str(number), (0,) * view.dim(), view) for number, view in enumerate(views)]
    record, stored = write_file(tmp_path / "file", items)
    data = (tmp_path / "file").read_bytes()
    assert (record.bytes, len(data)) == (len(data), stored[-1].offset + stored[-1].bytes)
    for view, where in zip(views, stored, strict=True):
        (tmp_path / "one").write_bytes(data[where.offset : where.offset + where.bytes])
        found = torch.load(tmp_path / "one", weights_only=True)
        assert torch.equal(found, view)
        assert where.bytes < view.numel() * view.element_size() + 2500


def test_the_checksum_is_that_of_the_file(tmp_path):
    import zlib

    output = _Output(tmp_path / "file")
    blocks = [b"ab", bytes(range(256)) * (1 << 13), b"c" * 5, b"d" * (1 << 20)]
    for block in blocks:
        assert output.write(block) == len(block)
    record = output.finish()
    output.close()
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(blocks)
    assert (record.bytes, record.crc32) == (len(content), f"{zlib.crc32(content):08x}")


class Call:
    """Unpickles as a call of `touch`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (touch, (str(self.path),))


def touch(path: str) -> None:
    Path(path).touch()


def test_metadata_runs_nothing(tmp_path):
    checkpoint(tmp_path)
    trap = tmp_path / "sprung"
    (tmp_path / METADATA).write_bytes(pickle.dumps(Call(trap)))
    with pytest.raises(DamagedCheckpointError, match=r"names .*touch, which no checkpoint needs"):
        Reader(tmp_path)
    assert not trap.exists()
    pickle.loads((tmp_path / METADATA).read_bytes())
    assert trap.exists(), "the trap works"


def test_tensors_run_nothing(tmp_path):
    checkpoint(tmp_path)
    trap = tmp_path / "sprung"
    torch.save(Call(trap), tmp_path / "__0_0.distcp")
    size = (tmp_path / "__0_0.distcp").stat().st_size
    reader = Reader(tmp_path)
    info = reader.tensors["x"]
    reader.tensors["x"] = info._replace(chunks=[(box, stored._replace(bytes=size)) for box, stored in info.chunks])
    with pytest.raises(DamagedCheckpointError, match="__0_0.distcp cannot be read"):
        reader.read("x")
    assert not trap.exists()


def test_metadata_names_no_file_outside(tmp_path):
    checkpoint(tmp_path)
    content = (tmp_path / METADATA).read_bytes()
    assert content.count(b"__0_0.distcp") == 1
    (tmp_path / METADATA).write_bytes(content.replace(b"__0_0.distcp", b"../../passwd"))
    with pytest.raises(DamagedCheckpointError, match="outside of the checkpoint"):
        Reader(tmp_path)


@pytest.mark.ranks(1)
def test_the_manifest_says_where_it_comes_from(tmp_path):
    trainer = build_trainer(run_config("single", tmp_path), tmp_path)
    steps(trainer, 2)
    folder = trainer.save()
    manifest = read_manifest(folder, "always")
    assert (manifest.step, manifest.consumed_samples, manifest.optimizer_step) == (2, 8, 2)
    assert manifest.loss == trainer.last_loss
    assert set(manifest.versions) == {"ling", "torch", "megatron-core"}
    assert manifest.config["model"]["activation"] == "swiglu"
    assert manifest.bytes == sum(
        path.stat().st_size for path in folder.rglob("*") if path.name != "manifest.json" and path.is_file()
    )
    assert "tokenizer/tokenizer.txt" in manifest.files
    assert not manifest.random_states
    assert json.loads((folder / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
