"""Save and load of model and optimizer through megatron-core's dist_checkpointing (`torch_dist`), on any layout."""

from __future__ import annotations

import os
import queue
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling

from ling.checkpoint.folder import Manifest, copy_tokenizer, write_manifest
from ling.parallel import groups

_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _metadata() -> dict[str, Any]:
    return {**_OPTIMIZER_FORMAT, "singleton_local_shards": False, "dp_cp_group": groups.data_with_context()}


def _unwrapped(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _model_state(chunks: list[Any]) -> dict[str, Any]:
    metadata = _metadata()
    states = [_unwrapped(chunk).sharded_state_dict(metadata=metadata) for chunk in chunks]
    return {"model": states[0]} if len(states) == 1 else {f"model{i}": state for i, state in enumerate(states)}


def _optimizer_state(optimizer: Any, model_state: dict[str, Any], is_loading: bool) -> Any:
    return optimizer.sharded_state_dict(model_state, is_loading, metadata=_metadata())


def save(folder: Path, chunks: list[Any], optimizer: Any, manifest: Manifest, tokenizer: Path) -> None:
    """Write a checkpoint aside and rename it when it is complete. All ranks call it; `folder` must not exist yet.

    Args:
        tokenizer: folder or file of the run's tokenizer; a copy goes into the checkpoint.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    model_state = _model_state(chunks)
    state = dict(model_state)
    if optimizer is not None:
        state["optimizer"] = _optimizer_state(optimizer, model_state, is_loading=False)
    # The writer reports to the process that saves. megatron-core's own queue lives in a server process, which outlives
    # a killed rank and keeps its output open.
    filesystem_async._results_queue = queue.Queue()
    with _quiet():
        dist_checkpointing.save(state, str(partial), ("torch_dist", 1))
    dist.barrier()
    if is_main:
        copy_tokenizer(tokenizer, partial)
        write_manifest(partial, manifest)
        for path in partial.rglob("*"):
            if path.is_file():
                _flush(path)
        _flush(partial)
        partial.rename(folder)
        _flush(folder.parent)
    dist.barrier()


@torch.no_grad()
def load(folder: Path, chunks: list[Any], optimizer: Any = None) -> None:
    """Read model (and optimizer) state of a checkpoint into this layout's parts. All ranks call it."""
    model_state = _model_state(chunks)
    state = dict(model_state)
    if optimizer is not None:
        state["optimizer"] = _optimizer_state(optimizer, model_state, is_loading=True)
    with _quiet():
        loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    for index, chunk in enumerate(chunks):
        _unwrapped(chunk).load_state_dict(loaded["model" if len(chunks) == 1 else f"model{index}"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])


class _quiet(warnings.catch_warnings):  # noqa: N801
    """Without the deprecation remarks of torch's and megatron-core's checkpoint code."""

    def __enter__(self) -> Any:
        result = super().__enter__()
        warnings.simplefilter("ignore")
        return result


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def versions() -> dict[str, str]:
    """Versions that a manifest records."""
    import megatron.core

    import ling

    return {"ling": ling.__version__, "torch": torch.__version__, "megatron-core": megatron.core.__version__}
