"""ling export without transformers: bits, files, refusals, interruptions."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from ling.cli import main
from ling.config.errors import UserError
from ling.hf.aside import partial_of, written_aside
from ling.hf.export import Options, check_run, export, open_source, slabs_of
from ling.hf.safetensors import Writer
from tests.checkpoint.files import make_checkpoint as checkpoint_of_tensors
from tests.dist.training import RUN, tiny_config
from tests.hf.directories import DENSE, MOE, draw, make_checkpoint, make_tokenizer, read_all
from tests.hf.test_names import assemble


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("moe") / "step_00000007", MOE)


@pytest.mark.parametrize("model", [MOE, DENSE], ids=["moe", "dense"])
def test_every_bit_in_fp32(tmp_path, model):
    tensors = draw(model)
    source = export(make_checkpoint(tmp_path / "checkpoint", model, tensors), tmp_path / "out")
    assert source.dtype == "float32"
    found = read_all(tmp_path / "out")
    wanted = assemble(model, tensors)
    assert set(found) == set(wanted)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items()
    )


def test_fp32_to_bf16_keeps_the_router_bias(tmp_path, moe):
    export(moe, tmp_path / "out", Options(dtype="bfloat16"))
    wanted = assemble(MOE, draw(MOE))
    for name, tensor in read_all(tmp_path / "out").items():
        assert tensor.dtype == (torch.float32 if name.endswith("expert_bias") else torch.bfloat16)
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name


def test_master_weights_are_taken_for_fp32(tmp_path):
    exact, rounded = draw(DENSE), draw(DENSE, torch.bfloat16)
    masters = {f"optimizer.state.param.{name}": tensor for name, tensor in exact.items()}
    folder = make_checkpoint(tmp_path / "checkpoint", DENSE, rounded | masters, torch.bfloat16)
    assert export(folder, tmp_path / "out").dtype == "bfloat16"
    assert export(folder, tmp_path / "exact", Options(dtype="float32")).uses_masters
    wanted = assemble(DENSE, exact)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read_all(tmp_path / "exact").items())
    assert all(torch.equal(tensor, wanted[name].bfloat16()) for name, tensor in read_all(tmp_path / "out").items())
    assert "fp32 master weights" in (tmp_path / "exact" / "README.md").read_text()


def test_layers_stored_one_by_one_or_stacked_are_the_same(tmp_path):
    stacked = draw(DENSE)
    apart = {}
    for name, tensor in stacked.items():
        if name.startswith("decoder.layers."):
            rest = name.removeprefix("decoder.layers.")
            apart |= {f"decoder.layers.{layer}.{rest}": part.clone() for layer, part in enumerate(tensor)}
        else:
            apart[name] = tensor
    for name, tensors in (("stacked", stacked), ("apart", apart)):
        export(make_checkpoint(tmp_path / name / "checkpoint", DENSE, tensors), tmp_path / name / "hf")
    one, other = (read_all(tmp_path / name / "hf") for name in ("stacked", "apart"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize(("limit", "workers"), [(20_000, 1), (20_000, 4), (150_000, 2)])
def test_shards(tmp_path, moe, limit, workers):
    export(moe, tmp_path / "out", Options(max_shard_bytes=limit, workers=workers))
    found, index = (
        read_all(tmp_path / "out"),
        json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text()),
    )
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    wanted = assemble(MOE, draw(MOE))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    for file in files:
        inside = [found[name].nbytes for name, where in index["weight_map"].items() if where == file]
        assert sum(inside) <= limit or len(inside) == 1


def test_the_directory_is_complete(tmp_path, moe):
    export(moe, tmp_path / "out", command="ling export run out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "configuration_bailing_moe_v2.py",
        "ffn_activations_powlu.py",
        "generation_config.json",
        "layers_bailing_moe_v2.py",
        "model.safetensors",
        "modeling_bailing_moe_v2.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "896 tokens (7 steps, 28 sequences of 32)" in card
    assert "powlu" in card
    assert "ling export run out" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_act"], config["powlu_m"], config["torch_dtype"]) == ("powlu", 3.0, "float32")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert not partial_of(tmp_path / "out").exists()


def test_an_interrupted_export_is_continued(tmp_path, moe, monkeypatch):
    written = []
    whole = Writer.write

    def fail_late(self, name, row, part):
        if len(written) == 100:
            raise KeyboardInterrupt
        written.append(name)
        whole(self, name, row, part)

    options = Options(max_shard_bytes=50_000, workers=1)
    monkeypatch.setattr(Writer, "write", fail_late)
    with pytest.raises(KeyboardInterrupt):
        export(moe, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    done = {path.name: path.stat().st_mtime_ns for path in partial_of(tmp_path / "out").glob("*.safetensors")}
    assert done
    other = make_checkpoint(tmp_path / "other", MOE)
    with pytest.raises(UserError, match="interrupted export of something else"):
        export(other, tmp_path / "out", options)
    monkeypatch.setattr(Writer, "write", whole)
    export(moe, tmp_path / "out", options)
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}.items()
    wanted = assemble(MOE, draw(MOE))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read_all(tmp_path / "out").items())


def test_each_stored_box_is_read_once(moe):
    """Slabs end where stored boxes do, and cover each tensor."""
    source = open_source(moe)
    for name, info in source.reader.tensors.items():
        slabs = list(slabs_of(name, info))
        assert [slab.first for slab in slabs] == [0, *(slab.last for slab in slabs[:-1])]
        assert slabs[-1].last == info.shape[0]
        for box, _ in info.chunks:
            touched = [s for s in slabs if s.first < box.start[0] + box.size[0] and box.start[0] < s.last]
            assert len(touched) == 1


def test_no_room(tmp_path, moe, monkeypatch):
    from ling.hf import aside

    monkeypatch.setattr(aside.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="make room"):
        export(moe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


ROUTERS = {
    "groups of one expert": {"moe_router_num_groups": MOE.num_moe_experts},
    "groups without a number to choose": {"moe_router_group_topk": None},
}


def test_a_disk_that_fills_up(tmp_path, moe, monkeypatch, capsys):
    """One line; what is finished is used by the next start."""
    from ling.hf import safetensors

    written, pwrite = [], os.pwrite

    def full(descriptor, data, position):
        if sum(written) > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(len(data))
        return pwrite(descriptor, data, position)

    command = ["export", str(moe), str(tmp_path / "out"), "--max-shard-size", "50KB", "--workers", "1"]
    monkeypatch.setattr(safetensors.os, "pwrite", full)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    done = {path.name: path.stat().st_ino for path in partial_of(tmp_path / "out").glob("*.safetensors")}
    assert done
    monkeypatch.setattr(safetensors.os, "pwrite", pwrite)
    assert main(command) == 0
    assert done.items() <= {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}.items()
    wanted = assemble(MOE, draw(MOE))
    found = read_all(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_two_at_the_same_time(tmp_path, moe, capsys):
    with written_aside(tmp_path / "out"):
        assert main(["export", str(moe), str(tmp_path / "out")]) == 2
        assert "is being written by another process" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_remains_of_a_step_that_was_done_again(tmp_path, monkeypatch):
    """The same name, step and places in the files, but other weights."""
    tensors = draw(MOE)
    folder = make_checkpoint(tmp_path / "checkpoint", MOE, tensors)
    monkeypatch.setattr(Writer, "_finish", lambda self, file: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(folder, tmp_path / "out")
    monkeypatch.undo()
    shutil.rmtree(folder)
    make_checkpoint(folder, MOE, {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(UserError, match="interrupted export of something else"):
        export(folder, tmp_path / "out")


def test_a_merged_checkpoint(tmp_path, capsys):
    """Weights only and in fp32, whatever the run's number format."""
    tensors = [draw(MOE, torch.bfloat16, seed) for seed in (0, 1)]
    folders = [str(make_checkpoint(tmp_path / str(n), MOE, t, torch.bfloat16)) for n, t in enumerate(tensors)]
    command = ["checkpoint", "merge", *folders, "--weights", "0.25", "0.75", "--output", str(tmp_path / "merged")]
    assert main(command) == 0, capsys.readouterr().err
    assert main(["export", str(tmp_path / "merged"), str(tmp_path / "fp32")]) == 0, capsys.readouterr().err
    assert main(["export", str(tmp_path / "merged"), str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    one, other = (assemble(MOE, each) for each in tensors)
    exact, rounded = read_all(tmp_path / "fp32"), read_all(tmp_path / "bf16")
    assert exact.keys() == rounded.keys() == one.keys()
    for name, tensor in exact.items():
        torch.testing.assert_close(tensor, 0.25 * one[name].float() + 0.75 * other[name].float())
        assert torch.equal(rounded[name], tensor.to(rounded[name].dtype))


def bad_checkpoint(folder, how):
    """A checkpoint folder with something wrong."""
    tensors, model = draw(MOE), MOE
    name = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
    if how == "nothing there":
        folder.mkdir()
        return folder / "nothing"
    if how == "not a checkpoint":
        folder.mkdir()
    elif how == "a file":
        folder.write_text("a checkpoint?")
    elif how == "a model directory":
        export(make_checkpoint(folder / "inner", MOE), folder / "hf")
        shutil.rmtree(folder / "inner")
        folder = folder / "hf"
    elif how in ("half a checkpoint", "a missing file", "a short file"):
        make_checkpoint(folder, MOE)
        damaged = folder / ("manifest.json" if how == "half a checkpoint" else "__0_0.distcp")
        damaged.unlink() if how != "a short file" else os.truncate(damaged, 1000)
    elif how == "unknown activation":
        values = exported_config()
        values["model"]["activation"] = {"name": "swish9"}
        return checkpoint_of_tensors(folder, tensors, 7, config=values)
    elif how == "missing tensor":
        del tensors[name]
    elif how == "unknown tensor":
        tensors["decoder.layers.9.mlp.linear_fc1.weight"] = torch.zeros(2, 2)
    elif how == "another shape":
        tensors[name] = tensors[name][:, :, :-1]
    elif how in ("nan", "inf"):
        tensors[name][3, 2, 1] = float(how)
    elif how == "other mcore field":
        model = replace(MOE, mcore={"softmax_scale": 0.5})
    elif how in ROUTERS:
        config = replace(tiny_config(model=MOE), model=replace(MOE, **ROUTERS[how]))  # past the rules of configs
        return make_checkpoint(folder, MOE, tensors, config=config)
    elif how == "small vocabulary":
        model = replace(MOE, vocab_size=64)
        tensors = draw(model)
    elif how == "no tokenizer":
        return checkpoint_of_tensors(folder, tensors, 7, config=exported_config())
    return folder if folder.exists() else make_checkpoint(folder, model, tensors)


def exported_config():
    from ling.config.report import to_dict

    return to_dict(tiny_config(model=MOE, precision={"recipe": "fp32"}))


@pytest.mark.parametrize(
    "how",
    [
        "nothing there",
        "not a checkpoint",
        "a file",
        "a model directory",
        "half a checkpoint",
        "a missing file",
        "a short file",
        "unknown activation",
        "missing tensor",
        "unknown tensor",
        "another shape",
        "nan",
        "inf",
        "other mcore field",
        *ROUTERS,
        "small vocabulary",
        "no tokenizer",
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, capsys, how):
    folder = bad_checkpoint(tmp_path / "checkpoint", how)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ling: error: ")
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def run_of(folder, model=MOE, **tokenizer):
    make_tokenizer(folder / "tokenizer", **tokenizer)
    return replace(tiny_config(model=model), data=replace(RUN.data, tokenizer=str(folder / "tokenizer")))


def test_a_run_that_could_not_be_exported(tmp_path):
    """What a run with `checkpoint.export_every` is asked before it starts."""
    check_run(run_of(tmp_path / "good"))
    with pytest.raises(UserError, match="drops repeated spaces"):
        check_run(run_of(tmp_path / "spaces", keeps_spaces=False))
    with pytest.raises(UserError, match=r"tokenizer has \d+ tokens, the model 64"):
        check_run(run_of(tmp_path / "small", replace(MOE, vocab_size=64)))
    with pytest.raises(UserError, match=r"model.mcore.softmax_scale"):
        check_run(run_of(tmp_path / "mcore", replace(MOE, mcore={"softmax_scale": 0.5})))


def test_what_is_there_is_not_overwritten(tmp_path, moe, capsys):
    (tmp_path / "out").mkdir()
    assert main(["export", str(moe), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_failed_check_keeps_the_folder_from_its_name(tmp_path, moe):
    seen = []

    def check(source, folder):
        seen.append((folder / "config.json").is_file())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        export(moe, tmp_path / "out", check=check)
    assert seen == [True]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--max-shard-size", "0GB"], ["--max-shard-size", "5XB"], ["--dtype", "fp8"], ["--workers", "0"], ["--data", "x"]],
)
def test_wrong_arguments(tmp_path, moe, capsys, arguments):
    assert main(["export", str(moe), str(tmp_path / "out"), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
