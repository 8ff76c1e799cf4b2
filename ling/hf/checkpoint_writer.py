"""A checkpoint written from tensors that are made one part at a time, so that no model need be in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ling.checkpoint.boxes import Box
from ling.checkpoint.folder import Manifest, record_of, write_manifest
from ling.checkpoint.torch_dist import Item, TensorInfo, write_file, write_index
from ling.hf.aside import check_room, written_aside
from ling.hf.tasks import LARGEST_SLAB, Progress, Slab

Spec = tuple[torch.dtype, tuple[int, ...]]


def write_checkpoint(
    out: Path,
    tensors: dict[str, Spec],
    make: Callable[[Slab], torch.Tensor],
    manifest: Manifest,
    put_tokenizer: Callable[[Path], object],
    *,
    workers: int = 2,
    what: str = "import",
) -> None:
    """Write the checkpoint folder `out`; it appears complete or not at all.

    Args:
        tensors: number format and shape of every tensor, by its name in a checkpoint.
        make: gives a slab of a tensor, contiguous; called from several threads.
        manifest: what the checkpoint says of itself; its files are filled in here.
        put_tokenizer: fills the folder that it is given, which does not exist yet.
        workers: threads, each with a file and a slab of its own.

    Raises:
        UserError: `out` exists, or there is no room.
    """
    slabs = [slab for name, spec in tensors.items() for slab in _slabs(name, *spec)]
    total = sum(slab.bytes for slab in slabs)
    check_room(out, total)
    progress = Progress(what, total)
    with written_aside(out) as partial:
        for left in [*partial.glob("*.distcp"), partial / "tokenizer"]:  # of an interrupted one: nothing to go on with
            _remove(left)
        shares = _shares(slabs, min(workers, len(slabs)))

        def write_share(number: int) -> tuple[str, object, list]:  # type: ignore[type-arg]
            def items() -> Iterator[Item]:
                for slab in shares[number]:
                    rank = len(tensors[slab.key][1])
                    yield Item(slab.key, (slab.first, *[0] * (rank - 1)), make(slab))
                    progress.add(slab.bytes)

            name = f"__0_{number}.distcp"
            record, stored = write_file(partial / name, items())
            return name, record, stored

        with ThreadPoolExecutor(len(shares)) as pool:
            written = list(pool.map(write_share, range(len(shares))))
        sizes = {(slab.key, slab.first): slab.last - slab.first for slab in slabs}
        infos = {name: TensorInfo(dtype, shape, []) for name, (dtype, shape) in tensors.items()}
        for _, _, stored in written:
            for each in stored:
                shape = (sizes[each.key, each.start[0]], *infos[each.key].shape[1:])
                infos[each.key].chunks.append((Box(each.start, shape), each))
        write_index(partial, infos, ())
        put_tokenizer(partial / "tokenizer")
        manifest.files = {name: record for name, record, _ in written}  # type: ignore[misc]
        for path in sorted(partial.rglob("*")):
            name = str(path.relative_to(partial))
            if path.is_file() and name not in manifest.files:
                manifest.files[name] = record_of(path)
        write_manifest(partial, manifest)


def _slabs(key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[Slab]:
    row = math.prod(shape[1:]) * dtype.itemsize
    rows = max(1, LARGEST_SLAB // row)
    for first in range(0, shape[0], rows):
        last = min(first + rows, shape[0])
        yield Slab(key, first, last, (last - first) * row)


def _shares(slabs: list[Slab], count: int) -> list[list[Slab]]:
    shares: list[list[Slab]] = [[] for _ in range(count)]
    load = [0] * count
    for slab in slabs:
        index = load.index(min(load))
        shares[index].append(slab)
        load[index] += slab.bytes
    return shares


def _remove(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            child.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
