"""Our reader and writer of the safetensors format, also against the package of that name."""

import json

import pytest
import torch

from ling.config.errors import UserError
from ling.hf.safetensors import INDEX, SINGLE, Reader, Writer, plan

TENSORS = {
    "a": torch.randn(5, 3).bfloat16(),
    "b": torch.randn(7),
    "c": torch.randn(2, 4),
    "d": torch.randn(3, 3).half(),
    "e": torch.randn(1).bfloat16(),
}


def write(folder, max_bytes=1 << 20):
    layout = plan(((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()), max_bytes)
    writer = Writer(folder, layout)
    for name, tensor in reversed(TENSORS.items()):
        for row in reversed(range(len(tensor))):
            writer.write(name, row, tensor[row : row + 1])
    assert not writer.missing
    if SINGLE not in layout.sizes:
        (folder / INDEX).write_text(json.dumps(layout.index_content))
    return layout


@pytest.mark.parametrize("max_bytes", [1, 40, 1 << 20])
def test_what_is_written_row_by_row_is_read(tmp_path, max_bytes):
    layout = write(tmp_path, max_bytes)
    assert len(layout.sizes) == {1: 5, 40: 4, 1 << 20: 1}[max_bytes]
    assert all((tmp_path / file).stat().st_size == size for file, size in layout.sizes.items())
    reader = Reader(tmp_path)
    assert set(reader.entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor)
    part = torch.empty(2, 3, dtype=torch.bfloat16)
    reader.read_rows("a", 1, part)
    assert torch.equal(part, TENSORS["a"][1:3])
    reader.close()


@pytest.mark.parametrize("max_bytes", [40, 1 << 20])
def test_the_package_reads_what_we_write_and_we_what_it_writes(tmp_path, max_bytes):
    package = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    found = {}
    for file in write(tmp_path, max_bytes).sizes:
        found |= package.load_file(tmp_path / file)
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    other = tmp_path / "other"
    other.mkdir()
    package.save_file(TENSORS, other / SINGLE, {"format": "pt"})
    reader = Reader(other)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())
    reader.close()


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    layout = plan(((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()), 40)
    writer = Writer(tmp_path, layout)
    for name in ("a", "b"):
        writer.write(name, 0, TENSORS[name])
    writer.write("c", 0, TENSORS["c"][:1])
    whole = {entry.file for name, entry in layout.entries.items() if name in ("a", "b")} - {layout.entries["c"].file}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == whole
    writer.close()
    again = Writer(tmp_path, layout)
    assert set(again.missing) == set(layout.sizes) - whole
    assert not again.is_missing("a")


def broken(folder, how):
    path = folder / SINGLE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if how == "cut":
        path.write_bytes(content[:-4])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no JSON":
        path.write_bytes(content[:8] + b"x" * length + content[8 + length :])
    elif how == "long header":
        path.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    elif how == "number format":
        header["a"]["dtype"] = "F8_E4M3"
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    elif how == "missing":
        path.unlink()
    elif how == "outside":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    elif how == "index":
        (folder / INDEX).write_text("{}")
    elif how == "named only":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


@pytest.mark.parametrize(
    "how", ["cut", "empty", "no JSON", "long header", "number format", "missing", "outside", "index", "named only"]
)
def test_damage_is_told(tmp_path, how):
    write(tmp_path)
    broken(tmp_path, how)
    with pytest.raises(UserError, match=str(tmp_path)):
        Reader(tmp_path)
