"""Small checkpoints made by hand, without a model, and small disks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ling.checkpoint.boxes import whole
from ling.checkpoint.folder import Manifest, partial_folder, step_folder
from ling.checkpoint.publish import publish
from ling.checkpoint.torch_dist import Item, TensorInfo, write_file, write_index
from ling.config.report import to_dict
from tests.dist.training import tiny_config


def make_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], step: int = 0, **values: Any) -> Path:
    """A checkpoint of these tensors, each in one box; `values` go to the manifest."""
    partial = partial_folder(folder)
    partial.mkdir(parents=True)
    items = [Item(key, (0,) * tensor.dim(), tensor) for key, tensor in tensors.items()]
    record, stored = write_file(partial / "__0_0.distcp", items)
    infos = {each.key: TensorInfo(tensors[each.key].dtype, tuple(tensors[each.key].shape), []) for each in stored}
    for each in stored:
        infos[each.key].chunks.append((whole(infos[each.key].shape), each))
    write_index(partial, infos, [])
    (partial / "tokenizer").mkdir()
    (partial / "tokenizer" / "tokenizer.txt").write_text("a tokenizer")
    manifest = Manifest(
        **{
            "step": step,
            "consumed_samples": 4 * step,
            "config": to_dict(tiny_config()),
            "world_size": 1,
            "versions": {},
            "optimizer_step": step,
            "saved_at": 1.8e9 - step,  # a clock that goes backwards
        }
        | values
    )
    publish(partial, folder, manifest, {"__0_0.distcp": record})
    return folder


def make_run(run_dir: Path, steps: list[int]) -> dict[int, Path]:
    """A run's folder with a checkpoint of one tensor, filled with its step, at each of these steps."""
    return {
        step: make_checkpoint(step_folder(run_dir, step), {"weight": torch.full((8, 32), float(step))}, step)
        for step in steps
    }


def flip_a_byte(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory, for the length of a `with`."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
