"""Small checkpoints and model directories for the tests of export, import and verification."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ling.checkpoint.folder import Manifest
from ling.config.report import to_dict
from ling.config.schema import Config, ModelConfig
from ling.hf.checkpoint_writer import write_checkpoint
from ling.hf.names import checkpoint_shapes, keeps_fp32
from ling.hf.safetensors import Layout, Reader, Writer, plan
from tests.dist.training import DENSE as SMALL_DENSE
from tests.dist.training import MOE as SMALL_MOE
from tests.dist.training import tiny_config

# with room for the tokens of the tests' tokenizer
MOE, DENSE = (replace(model, vocab_size=300) for model in (SMALL_MOE, SMALL_DENSE))

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install 'ling[hf]'"
)


def draw(model: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Checkpoint tensors of a model that all matter: uneven norms, matrices that keep the size, a biased router."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in checkpoint_shapes(model).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            noise = 1 + 0.2 * noise
        elif len(shape) == 1:
            noise = 0.1 + 0.1 * noise
        else:
            noise = 0.7 * noise / shape[-1] ** 0.5
        tensors[name] = noise if keeps_fp32(name) else noise.to(dtype)
    return tensors


def make_tokenizer(folder: Path, keeps_spaces: bool = True) -> None:
    """A SentencePiece tokenizer of at most 300 tokens."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir(parents=True, exist_ok=True)
    text = [f"{word} {word[::-1]}" for word in ("alpha", "beta", "gamma", "delta", "epsilon", "hello world") * 5]
    with open(folder / "tokenizer.model", "wb") as model_file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=model_file,
            model_type="bpe",
            vocab_size=290,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=not keeps_spaces,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )


def make_checkpoint(
    folder: Path,
    model: ModelConfig,
    tensors: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    config: Config | None = None,
) -> Path:
    """A checkpoint folder of a model at step 7."""
    tensors = draw(model, dtype) if tensors is None else tensors
    recipe = "bf16" if dtype == torch.bfloat16 else "fp32"
    config = config or tiny_config(model=model, precision={"recipe": recipe})
    manifest = Manifest(step=7, consumed_samples=28, config=to_dict(config), world_size=1, versions={"ling": "0"})
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_checkpoint(
        folder, specs, lambda slab: tensors[slab.key][slab.first : slab.last], manifest, make_tokenizer, workers=2
    )
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory."""
    reader = Reader(folder)
    try:
        return {name: reader.read(name) for name in reader.entries}
    finally:
        reader.close()


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None], name: str = "model.safetensors") -> None:
    """Change (or with None remove) tensors of a directory with one file of weights."""
    tensors = {key: value for key, value in (read_all(folder) | changes).items() if value is not None}
    (folder / name).unlink()
    layout: Layout = plan(((key, value.dtype, tuple(value.shape)) for key, value in tensors.items()), 1 << 40)
    writer = Writer(folder, layout)
    for key, value in tensors.items():
        writer.write(key, 0, value)
    writer.close()


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of a directory's config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({key: value for key, value in config.items() if value is not None or key not in changes})
    )
