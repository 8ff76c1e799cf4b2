"""Directories in the form of Ling-mini-2.0, flash-2.0 and 1T: published names, written down by hand."""

import json
from pathlib import Path

import pytest
import torch

from ling.checkpoint.torch_dist import Reader
from ling.cli import main
from ling.hf.export import export
from ling.hf.safetensors import INDEX, Writer, plan
from ling.hf.tokenizer import tokenizer_files
from tests.hf.directories import make_tokenizer, read_all
from tests.hf.test_config import LING_MINI

HEAD, EXPERTS, EXPERT_WIDTH = 16, 16, 24
SMALL = {
    "vocab_size": 320,
    "head_dim": HEAD,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": EXPERT_WIDTH,
    "moe_shared_expert_intermediate_size": EXPERT_WIDTH,
    "num_hidden_layers": 6,
    "max_position_embeddings": 64,
    # keys of the published files that concern the library alone
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "max_window_layers": 20,
    "transformers_version": "4.52.3",
    "output_router_logits": False,
}
# what sets the three apart, in small: heads, dense layers, widths
FAMILY = {
    "mini": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 120},
    "flash": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 144},
    "1T": {
        "hidden_size": 80,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 160,
        "first_k_dense_replace": 4,
    },
}


def published_tensors(config: dict) -> dict[str, torch.Tensor]:
    """Weights under the published names."""
    hidden, kv = config["hidden_size"], config["num_key_value_heads"] * HEAD
    queries = config["num_attention_heads"] * HEAD
    shapes = {"model.word_embeddings.weight": (320, hidden), "lm_head.weight": (320, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{norm}.weight"] = (hidden,)
        shapes[f"{at}.attention.query_key_value.weight"] = (queries + 2 * kv, hidden)
        shapes[f"{at}.attention.dense.weight"] = (hidden, queries)
        shapes[f"{at}.attention.query_layernorm.weight"] = shapes[f"{at}.attention.key_layernorm.weight"] = (HEAD,)
        ffns = {f"{at}.mlp": config["intermediate_size"]}
        if layer >= config["first_k_dense_replace"]:
            shapes[f"{at}.mlp.gate.weight"], shapes[f"{at}.mlp.gate.expert_bias"] = (EXPERTS, hidden), (EXPERTS,)
            ffns = {f"{at}.mlp.experts.{expert}": EXPERT_WIDTH for expert in range(EXPERTS)}
            ffns[f"{at}.mlp.shared_experts"] = EXPERT_WIDTH
        for name, width in ffns.items():
            shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (width, hidden)
            shapes[f"{name}.down_proj.weight"] = (hidden, width)
    generator = torch.Generator().manual_seed(0)
    formats = {name: torch.float32 if name.endswith("expert_bias") else torch.bfloat16 for name in shapes}
    return {name: torch.randn(shape, generator=generator).to(formats[name]) for name, shape in shapes.items()}


def write_directory(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    make_tokenizer(folder / "made")
    folder.joinpath("tokenizer.json").write_bytes(tokenizer_files(folder / "made", 64).files["tokenizer.json"])
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(special))
    for path in (folder / "made").iterdir():
        path.unlink()
    (folder / "made").rmdir()
    folder.joinpath("config.json").write_text(json.dumps(config))
    layout = plan(((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()), 100_000)
    folder.joinpath(INDEX).write_text(json.dumps(layout.index_content))
    writer = Writer(folder, layout)
    for name, tensor in tensors.items():
        writer.write(name, 0, tensor)
    writer.close()


@pytest.mark.parametrize("name", FAMILY)
def test_import(tmp_path, capsys, name):
    config = LING_MINI | SMALL | FAMILY[name]
    tensors = published_tensors(config)
    folder = tmp_path / name
    folder.mkdir()
    write_directory(folder, config, tensors)
    assert main(["import", str(folder), str(tmp_path / "checkpoint")]) == 0, capsys.readouterr().err
    reader = Reader(tmp_path / "checkpoint")
    at = f"decoder.layers.{config['first_k_dense_replace']}"
    theirs = f"model.layers.{config['first_k_dense_replace']}"

    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    rows = tensors[f"{theirs}.attention.query_key_value.weight"].unflatten(0, (-1, HEAD))
    query, key, value = rows.split([heads, groups, groups])
    per_group = heads // groups
    wanted = [torch.cat([query[g * per_group : (g + 1) * per_group], key[g : g + 1], value[g : g + 1]])
              for g in range(groups)]  # fmt: skip
    assert torch.equal(reader.read(f"{at}.self_attention.linear_qkv.weight"), torch.cat(wanted).flatten(0, 1))

    experts = [
        torch.cat([tensors[f"{theirs}.mlp.experts.{e}.{proj}_proj.weight"] for proj in ("gate", "up")])
        for e in range(EXPERTS)
    ]
    assert torch.equal(reader.read(f"{at}.mlp.experts.experts.linear_fc1.weight"), torch.stack(experts))
    bias = reader.read(f"{at}.mlp.router.expert_bias")
    assert bias.dtype == torch.float32
    assert torch.equal(bias, tensors[f"{theirs}.mlp.gate.expert_bias"])

    export(tmp_path / "checkpoint", tmp_path / "again")
    again = read_all(tmp_path / "again")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) and again[key].dtype == tensor.dtype for key, tensor in tensors.items())
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    unread = {"use_sliding_window", "max_window_layers", "transformers_version", "output_router_logits"}
    assert {key: written[key] for key in config.keys() - unread} == {key: config[key] for key in config.keys() - unread}
