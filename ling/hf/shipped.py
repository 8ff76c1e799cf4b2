"""The small files of a model directory: configurations, model card, and Python code with the model's activations."""

from __future__ import annotations

import json
import re
from importlib.resources import files as resources
from typing import TYPE_CHECKING, Any

import ling
from ling.activations.table import Activation, resolve
from ling.config.derived import activation_for
from ling.config.schema import ModelConfig
from ling.hf.config import CONFIGURATION, MODELING, hidden_act, kinds_of
from ling.model.counts import count_parameters

if TYPE_CHECKING:
    from ling.hf.export import Source

LAYERS, ACTIVATIONS_FILE = "layers_bailing_moe_v2", "ffn_activations"


def files(source: Source, config: dict[str, Any], command: str) -> dict[str, bytes]:
    """Content of every file but weights and tokenizer, by name."""
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(tokens, indent=2) + "\n",
        "README.md": model_card(source, config, command),
    }
    for name in (CONFIGURATION, MODELING, LAYERS):
        texts[f"{name}.py"] = _code(name)
    # transformers 4 keeps the first module of a name that it has seen, so other activations need another name
    name, content = activation_file(source.config.model)
    texts[f"{name}.py"] = content
    shipped = f"SHIPPED_ACTIVATIONS: tuple[str, ...] = {tuple(sorted(_rows(source.config.model)))}"
    texts[f"{CONFIGURATION}.py"] = re.sub(r"SHIPPED_ACTIVATIONS: .* = \(\)", shipped, texts[f"{CONFIGURATION}.py"])
    texts[f"{MODELING}.py"] = texts[f"{MODELING}.py"].replace(f"from .{ACTIVATIONS_FILE} ", f"from .{name} ")
    return {name: text.encode() for name, text in texts.items()}


def _code(name: str) -> str:
    return (resources("ling.hf") / "modeling" / f"{name}.py").read_text(encoding="utf-8")


def activation_file(model: ModelConfig) -> tuple[str, str]:
    """Name and text of the shipped module with the sources of a model's activations, as the registry has them."""
    text = _code(ACTIVATIONS_FILE)
    rows = _rows(model)
    for row in rows.values():
        text += f"\n\n{row.math_source()}\n\n{_entry(row)}\n"
    return "_".join([ACTIVATIONS_FILE, *sorted(rows)]), text


def _rows(model: ModelConfig) -> dict[str, Activation]:
    found = (resolve(activation_for(model, kind)).activation for kind in kinds_of(model))
    return {row.name: row for row in found}


def _entry(row: Activation) -> str:
    arguments = [row.math.__name__, f"name={row.name!r}", f"gated={row.gated}"]
    params = tuple(parameter.name for parameter in row.parameters if parameter.in_math)
    learnable = tuple(learnable.name for learnable in row.learnable)
    arguments += [f"params={params}"] if params else []
    arguments += [f"learnable={learnable}"] if learnable else []
    arguments += ["rowwise=True"] if row.rowwise else []
    return f"ROWS[{hidden_act(row)!r}] = Row({', '.join(arguments)})"


def model_card(source: Source, config: dict[str, Any], command: str) -> str:
    """README.md of a model directory."""
    model, manifest, run = source.config.model, source.manifest, source.config
    count = count_parameters(model)
    rows = {
        "architecture": f"Ling 2.0 ({config['architectures'][0]}), {'dense' if not model.num_moe_experts else 'MoE'}",
        "parameters": f"{count.total_without_mtp:,}, of which a token uses {count.activated:,}",
        "MTP layers": f"{model.mtp_num_layers}"
        + (f" ({count.components.mtp:,} more parameters)" * bool(model.mtp_num_layers)),
        "layers, hidden size": f"{model.num_layers}, {model.hidden_size}",
        "attention": f"{model.num_attention_heads} query and {config['num_key_value_heads']} key/value heads of "
        f"{config['head_dim']}, RoPE on {config['rotary_dim']} channels with theta {model.rotary_base:g}",
        **_experts(model),
        "activation": _activations(model),
        "vocabulary": f"{config['vocab_size']} (padding included), context {model.max_position_embeddings} tokens",
        "weights": source.dtype + (", from the fp32 master weights" if source.uses_masters else ""),
        "trained on": f"{manifest.consumed_samples * run.data.sequence_length:,} tokens "
        f"({manifest.step:,} steps, {manifest.consumed_samples:,} sequences of {run.data.sequence_length})",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _CARD.format(
        name=run.run.name,
        table=table,
        command=command or "ling export CKPT OUT",
        checkpoint=source.folder.name,
        version=ling.__version__,
        stock=_stock(config),
    )


def _experts(model: ModelConfig) -> dict[str, str]:
    if model.num_moe_experts is None:
        return {"FFN": f"width {model.ffn_hidden_size}"}
    shared = model.moe_shared_expert_intermediate_size
    text = f"{model.num_moe_experts} of width {model.moe_ffn_hidden_size}, {model.moe_router_topk} for each token"
    text += f", and shared ones of width {shared}" if shared else ""
    return {"experts": text, "dense layers": f"the first {model.first_k_dense_replace}, width {model.ffn_hidden_size}"}


def _activations(model: ModelConfig) -> str:
    specs = {kind: dict(activation_for(model, kind)) for kind in kinds_of(model)}
    texts = {
        kind: ", ".join(str(v) if k == "name" else f"{k} = {v}" for k, v in spec.items())
        for kind, spec in specs.items()
    }
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{kind}: {text}" for kind, text in texts.items())


def _stock(config: dict[str, Any]) -> str:
    if config["hidden_act"] == "silu":
        return "The activation is SwiGLU, so inclusionAI's own code for Ling 2.0 loads this directory, too."
    return (
        f"`hidden_act` is `{config['hidden_act']}`, which other code for this architecture may not know; "
        "what does not read that key, such as vLLM, would compute something else."
    )


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", trust_remote_code=True, torch_dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

The model's code is in this directory and needs transformers 4.51 or later. {stock}
`model(input_ids, output_mtp_logits=True).mtp_logits` has the logits of the MTP layers.

## How it was made

Exported by ling {version} from the checkpoint `{checkpoint}`:

```bash
{command}
```
"""
