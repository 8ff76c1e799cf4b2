"""ling import: the exact way back, and what it refuses."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from ling.checkpoint.folder import read_manifest
from ling.checkpoint.torch_dist import Reader
from ling.cli import main
from ling.config.errors import UserError
from ling.config.report import to_dict
from ling.hf import aside, checkpoint_writer, safetensors
from ling.hf.export import Options, export
from ling.hf.importing import import_model
from ling.hf.safetensors import INDEX
from tests.dist.training import tiny_config
from tests.hf.directories import DENSE, MOE, draw, edit_config, make_checkpoint, read_all, rewrite

MODELS = {
    "moe": MOE,
    "dense": DENSE,
    "ungated, no MTP": replace(MOE, activation="relu2", mtp_num_layers=0),
    "scalars": replace(MOE, activation="polyrelu"),
    "fixed scalars": replace(MOE, activation="leaky_relu"),
    "one scalar for all": replace(MOE, activation={"name": "leaky_relu", "learn": "global"}),
    "mixed": replace(MOE, routed_activation="gelu", shared_activation="swiglu"),
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    reader = Reader(folder)
    return {name: reader.read(name) for name in reader.tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_exact(tmp_path, name, dtype, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "LARGEST_SLAB", 5000)  # several boxes of a tensor
    tensors = draw(MODELS[name], dtype)
    export(make_checkpoint(tmp_path / "first", MODELS[name], tensors, dtype), tmp_path / "hf")
    config = import_model(tmp_path / "hf", tmp_path / "second")
    assert config.precision.recipe == ("fp32" if dtype == torch.float32 else "bf16")
    found = stored(tmp_path / "second")
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    read_manifest(tmp_path / "second", "always")
    export(tmp_path / "second", tmp_path / "again", Options(max_shard_bytes=100_000))
    first, again = read_all(tmp_path / "hf"), read_all(tmp_path / "again")
    assert set(first) == set(again)
    assert all(torch.equal(first[key], again[key]) for key in first)
    (activations,) = (path.name for path in (tmp_path / "hf").glob("ffn_activations_*.py"))
    for file in ("config.json", activations, "tokenizer.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("directory")
    export(make_checkpoint(folder / "checkpoint", MOE), folder / "hf")
    return folder / "hf"


@pytest.fixture
def copy(directory, tmp_path):
    """A directory of one's own to break."""
    import shutil

    shutil.copytree(directory, tmp_path / "hf")
    return tmp_path / "hf"


def break_directory(folder: Path, how: str) -> None:
    expert = "model.layers.2.mlp.experts.3.up_proj.weight"
    weights = read_all(folder)
    if how == "missing tensor":
        rewrite(folder, {expert: None})
    elif how == "missing MTP":
        rewrite(folder, {name: None for name in weights if name.startswith("model.layers.4.")})
    elif how == "unknown tensor":
        rewrite(folder, {"model.layers.0.attention.query_key_value.bias": torch.zeros(3)})
    elif how == "another shape":
        rewrite(folder, {expert: torch.zeros(31, 64)})
    elif how == "nan":
        rewrite(folder, {expert: torch.full_like(weights[expert], torch.nan)})
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "no JSON":
        (folder / "config.json").write_text("{")
    elif how == "no tokenizer":
        for name in ("tokenizer.model", "tokenizer.json"):
            (folder / name).unlink()
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "a short file":
        os.truncate(folder / "model.safetensors", 100_000)
    elif how == "no safetensors":
        (folder / "model.safetensors").write_text("<html>not found</html>")
    elif how == "a missing shard":
        index = {"weight_map": dict.fromkeys(weights, "model.safetensors") | {expert: "model-2.safetensors"}}
        (folder / INDEX).write_text(json.dumps(index))
    elif how == "a shard outside":
        (folder / INDEX).write_text(json.dumps({"weight_map": {expert: "../model.safetensors"}}))
    elif how == "half an export":  # what `ling export` leaves when it is killed
        for path in folder.iterdir():
            if path.name != "model.safetensors":
                path.unlink()
        (folder / "model.safetensors").rename(folder / "model.safetensors.part")
    elif how == "fp8":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content.replace(b'"F32"', b'"F8_"', 1))
    elif how == "architecture":
        edit_config(folder, architectures=["Qwen3MoeForCausalLM"])
    elif how == "hidden_act":
        edit_config(folder, hidden_act="swish9")
    elif how == "pickle":
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "how",
    [
        "missing tensor",
        "missing MTP",
        "unknown tensor",
        "another shape",
        "nan",
        "no config",
        "no JSON",
        "no tokenizer",
        "no weights",
        "a short file",
        "no safetensors",
        "a missing shard",
        "a shard outside",
        "half an export",
        "fp8",
        "architecture",
        "hidden_act",
        "pickle",
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(copy, tmp_path, capsys, how):
    break_directory(copy, how)
    assert main(["import", str(copy), str(tmp_path / "checkpoint")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ling: error: ")
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize("what", ["nothing", "file", "checkpoint"])
def test_what_is_no_model_directory(tmp_path, capsys, what):
    path = tmp_path / what
    if what == "file":
        path.write_text("{}")
    elif what == "checkpoint":
        make_checkpoint(path, MOE)
    assert main(["import", str(path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "is no Hugging Face model directory: it has no config.json" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_room(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aside.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert main(["import", str(directory), str(tmp_path / "checkpoint")]) == 2
    assert "make room" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupted_import_starts_anew(directory, tmp_path, monkeypatch):
    read_rows, count = safetensors.Reader.read_rows, []

    def fail_late(self, name, row, target):
        count.append(name)
        if len(count) == 50:
            raise KeyboardInterrupt
        read_rows(self, name, row, target)

    monkeypatch.setattr(safetensors.Reader, "read_rows", fail_late)
    with pytest.raises(KeyboardInterrupt):
        import_model(directory, tmp_path / "checkpoint", workers=1)
    assert not (tmp_path / "checkpoint").exists()
    monkeypatch.setattr(safetensors.Reader, "read_rows", read_rows)
    import_model(directory, tmp_path / "checkpoint")
    read_manifest(tmp_path / "checkpoint", "always")
    wanted = draw(MOE)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in stored(tmp_path / "checkpoint").items())
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_pickles_where_they_are_allowed(copy, tmp_path, directory, capsys):
    break_directory(copy, "pickle")
    assert main(["import", str(copy), str(tmp_path / "checkpoint"), "--allow-pickle"]) == 0
    assert main(["import", str(directory), str(tmp_path / "other")]) == 0
    found, wanted = stored(tmp_path / "checkpoint"), stored(tmp_path / "other")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_pickle_that_is_a_program_is_not_run(copy, tmp_path, capsys):
    import pickle

    class Program:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    break_directory(copy, "pickle")
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Program()}))
    assert main(["import", str(copy), str(tmp_path / "checkpoint"), "--allow-pickle"]) == 2
    assert not (tmp_path / "ran").exists()


def test_what_is_there_is_not_overwritten(directory, tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    assert main(["import", str(directory), str(tmp_path / "checkpoint")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_scalars_that_all_layers_share_must_be_equal(tmp_path):
    model = replace(MOE, activation={"name": "leaky_relu", "learn": "global"})
    export(make_checkpoint(tmp_path / "first", model), tmp_path / "hf")
    rewrite(tmp_path / "hf", {"model.layers.2.mlp.act_fn.scalars": torch.tensor([0.5])})
    with pytest.raises(UserError, match="global"):
        import_model(tmp_path / "hf", tmp_path / "second")


def test_the_config_of_a_run(directory, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    values = to_dict(tiny_config(model=MOE))
    path.write_text(yaml.safe_dump(values))
    import_model(directory, tmp_path / "checkpoint", config_file=str(path))
    assert read_manifest(tmp_path / "checkpoint").config["model"]["vocab_size"] == MOE.vocab_size
    values["model"]["rotary_base"] = 5000.0
    path.write_text(yaml.safe_dump(values))
    assert main(["import", str(directory), str(tmp_path / "other"), "--config", str(path)]) == 2
    assert "rope_theta" in capsys.readouterr().err
