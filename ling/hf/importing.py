"""A Hugging Face model directory (Ling 2.0, or an export) to a checkpoint, in bounded memory and without a GPU."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from ling.checkpoint.folder import Manifest
from ling.checkpoint.versions import versions
from ling.config.errors import UserError
from ling.config.load import from_dict, load_config
from ling.config.report import to_dict
from ling.config.rules import check_config
from ling.config.schema import Config, ModelConfig
from ling.hf.checkpoint_writer import Spec, write_checkpoint
from ling.hf.config import hf_config, model_config
from ling.hf.names import SHARED_SCALARS, Piece, by_source, checkpoint_shapes, keeps_fp32, pieces, segments
from ling.hf.safetensors import INDEX, SINGLE, Entry, Reader
from ling.hf.tasks import Slab
from ling.hf.tokenizer import copy_back

_TRAINING_KEYS = ("mtp_loss_scaling_factor", "initializer_range", "max_position_embeddings")
_IGNORED = "inv_freq"  # a table that some libraries store; it follows from the config


class Weights(Protocol):
    """Tensors of a model directory."""

    entries: dict[str, Entry]

    def read_rows(self, name: str, row: int, target: torch.Tensor) -> None:
        """Fill `target` with the rows from `row` on."""


class PickleReader:
    """The tensors of `pytorch_model*.bin` files, through torch's loader for weights only."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for path in files:
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
                raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); fetch it anew") from None
            for name, tensor in found.items():
                self._tensors[name] = tensor
                self.entries[name] = Entry(path.name, tensor.dtype, tuple(tensor.shape), 0)

    def read_rows(self, name: str, row: int, target: torch.Tensor) -> None:
        """Fill `target` with the rows from `row` on."""
        target.copy_(self._tensors[name][row : row + target.shape[0]])


def open_weights(folder: Path, allow_pickle: bool) -> Weights:
    """The weights of a model directory.

    Raises:
        UserError: there are none, they are damaged, or they are pickles and those are not allowed.
    """
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        if not allow_pickle:
            raise UserError(
                f"{folder} has its weights as {pickles[0].name}, a pickle, which can hold programs; fetch the "
                "safetensors files, or give --allow-pickle where you trust its source"
            )
        return PickleReader(folder, pickles)
    return Reader(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model directory's config.json; UserError where there is none."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no Hugging Face model directory: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; fetch it anew")
    return content


def import_model(
    folder: Path, out: Path, *, config_file: str | None = None, allow_pickle: bool = False, workers: int = 2
) -> Config:
    """Write the checkpoint `out` from a model directory; it appears complete or not at all.

    It holds weights and tokenizer, at step 0 and without optimizer state, and any layout can load it.

    Args:
        config_file: config of the run that is to begin from it; its model must be that of the directory. Without it
            the checkpoint's config has the directory's model, and placeholders for data and training.

    Returns:
        The config that the checkpoint holds.

    Raises:
        UserError: another architecture, missing, unknown or damaged tensors, `out` exists, no room on the disk.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder, or remove it")
    where = str(folder / "config.json")
    run = None if config_file is None else _run_config(config_file)
    model = model_config(read_config(folder), where)
    weights = open_weights(folder, allow_pickle)
    config = _placeholders(folder, model, weights) if run is None else _same_model(run, str(config_file), model, where)
    grouped = by_source(pieces(config.model))
    check_tensors([piece for group in grouped.values() for piece in group], weights.entries, folder)
    _check_shared(grouped, weights, folder)
    tensors: dict[str, Spec] = {
        name: (_dtype(name, grouped[name], weights), shape) for name, shape in checkpoint_shapes(config.model).items()
    }
    manifest = Manifest(step=0, consumed_samples=0, config=to_dict(config), world_size=1, versions=versions())
    make = _maker(grouped, tensors, weights, folder)
    write_checkpoint(out, tensors, make, manifest, lambda target: copy_back(folder, target), workers=workers)
    return config


def _maker(
    grouped: dict[str, list[Piece]], tensors: dict[str, Spec], weights: Weights, folder: Path
) -> Callable[[Slab], torch.Tensor]:
    def make(slab: Slab) -> torch.Tensor:
        dtype, shape = tensors[slab.key]
        tensor = torch.empty((slab.last - slab.first, *shape[1:]), dtype=dtype)
        for segment in segments(grouped[slab.key], slab.first, slab.last):
            name, rows = segment.piece.name, segment.view(tensor, slab.first)
            stored = weights.entries[name].dtype
            target = rows if stored == dtype else torch.empty(rows.shape, dtype=stored)
            weights.read_rows(name, segment.row, target)
            if target is not rows:
                rows.copy_(target)
        low, high = tensor.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise UserError(f"{folder}: weights of {slab.key} are inf or nan; fetch or export it anew")
        return tensor

    return make


def check_tensors(wanted: list[Piece], entries: dict[str, Entry], folder: Path) -> None:
    """Refuse a directory that lacks a tensor, has one that nothing uses, or one of another shape."""
    shapes = {piece.name: piece.shape for piece in wanted}
    missing = [name for name in shapes if name not in entries]
    unused = [name for name in entries if name not in shapes and not name.endswith(_IGNORED)]
    for names, problem in ((missing, "lacks"), (unused, "has, but its config has no place for,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder} {problem} {names[0]}{more}; its config.json and its weights do not fit")
    for name, shape in shapes.items():
        if entries[name].shape != tuple(shape):
            raise UserError(
                f"{folder}: {name} has the shape {list(entries[name].shape)}, its config.json says {list(shape)}"
            )


def _check_shared(grouped: dict[str, list[Piece]], weights: Weights, folder: Path) -> None:
    """Scalars that a checkpoint holds once must be the same in all layers."""
    for source, group in grouped.items():
        if source.startswith(SHARED_SCALARS):
            values = []
            for piece in group:
                values.append(torch.empty(piece.shape, dtype=weights.entries[piece.name].dtype))
                weights.read_rows(piece.name, 0, values[-1])
                if not torch.equal(values[0], values[-1]):
                    raise UserError(
                        f"{folder}: {group[0].name} and {piece.name} differ, though the activation's scalars are "
                        "learned `global`; set <activation>_learn to per_layer in config.json"
                    )


def _dtype(name: str, group: list[Piece], weights: Weights) -> torch.dtype:
    """The number format of the directory, where a checkpoint has it: fp16 becomes fp32."""
    if keeps_fp32(name):
        return torch.float32
    formats = Counter(weights.entries[piece.name].dtype for piece in group)
    return torch.bfloat16 if set(formats) == {torch.bfloat16} else torch.float32


def _placeholders(folder: Path, model: ModelConfig, weights: Weights) -> Config:
    """A config that holds the model; nothing trains by it."""
    embedding = weights.entries.get("model.word_embeddings.weight")
    bf16 = embedding is not None and embedding.dtype == torch.bfloat16
    values: dict[str, Any] = {
        "run": {"name": folder.resolve().name},
        "model": dataclasses.asdict(model),
        "data": {
            "train": "none",
            "tokenizer": "tokenizer",
            "sequence_length": min(model.max_position_embeddings, 4096),
        },
        "optim": {"lr": 1e-4},
        "precision": {"recipe": "bf16" if bf16 else "fp32"},
        "train": {"train_iters": 1, "global_batch_size": 1},
    }
    config = from_dict(values, str(folder))
    check_config(config)
    return config


def _run_config(config_file: str) -> Config:
    config = load_config(config_file)
    check_config(config)
    return config


def _same_model(config: Config, config_file: str, model: ModelConfig, where: str) -> Config:
    none = dict.fromkeys(("bos", "eos", "pad"))
    ours, theirs = hf_config(config.model, "float32", none), hf_config(model, "float32", none)
    different = [key for key in [*theirs, *ours] if ours.get(key) != theirs.get(key) and key not in _TRAINING_KEYS]
    if different:
        key = different[0]
        raise UserError(
            f"{config_file} is of another model than {where}: {key} would be {ours.get(key)!r}, not "
            f"{theirs.get(key)!r}; change the config's model"
        )
    return config
