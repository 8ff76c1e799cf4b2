"""The files of a checkpoint in megatron-core's `torch_dist` format, which is that of torch.distributed.checkpoint.

`*.distcp` files hold tensors one after the other, each as `torch.save` writes it; `.metadata` is a pickle that says
which box of which tensor stands where; `metadata.json` and `common.pt` are what megatron-core's own loader asks for
besides.

Nothing is unpickled but an allow-list of classes that hold numbers and names: `.metadata` by an unpickler that knows no
others, tensors by torch's `weights_only` loader. A checkpoint from elsewhere can be wrong, but it runs no code.
"""

from __future__ import annotations

import enum
import io
import json
import os
import pickle
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ling.checkpoint.boxes import Box, Index, overlap
from ling.checkpoint.folder import DamagedCheckpointError, FileRecord
from ling.checkpoint.parts import Part
from ling.config.errors import UserError

METADATA = ".metadata"
write_some = os.write
"""The one place through which tensors go to disk."""
_BUFFER_BYTES = 1 << 20
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # megatron-core keeps what each rank wrote
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class Item(NamedTuple):
    """Something to write: a box of a tensor, or (with `start` None) an object that is saved whole."""

    key: str
    start: Index | None
    value: Any


class Stored(NamedTuple):
    """Where an item stands: file, first byte and length."""

    key: str
    start: Index | None
    file: str
    offset: int
    bytes: int


class _Output:
    """A file that counts and checksums what goes into it; small writes are gathered."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._pending = bytearray()
        self.bytes, self._crc32 = 0, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Append bytes."""
        size = len(data)
        if size >= _BUFFER_BYTES:
            self._drain()
            self._append(memoryview(data).cast("B"))
        else:
            self._pending += data
            if len(self._pending) >= _BUFFER_BYTES:
                self._drain()
        self.bytes += size
        return size

    def flush(self) -> None:
        """Nothing: `torch.save` asks for it after every tensor."""

    def finish(self) -> FileRecord:
        """Everything to disk."""
        self._drain()
        os.fsync(self._descriptor)
        return FileRecord(self.bytes, f"{self._crc32:08x}")

    def close(self) -> None:
        """Give the file up; without `finish` before, what it holds is worth nothing."""
        os.close(self._descriptor)

    def _drain(self) -> None:
        if self._pending:
            self._append(memoryview(bytes(self._pending)))
            self._pending.clear()

    def _append(self, data: memoryview) -> None:
        for first in range(0, len(data), 16 * _BUFFER_BYTES):  # a block is still in the cache when it is written
            block = data[first : first + 16 * _BUFFER_BYTES]
            self._crc32 = zlib.crc32(block, self._crc32)
            try:
                while block:
                    block = block[write_some(self._descriptor, block) :]
            except OSError as error:
                self.error = error
                raise


@contextmanager
def _without_zip_checksums() -> Iterator[None]:
    """Let `torch.save` compute no CRC of its own: the file's covers it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_file(path: Path, items: Iterable[Item]) -> tuple[FileRecord, list[Stored]]:
    """Write items into a new `.distcp` file and flush it to disk.

    Returns:
        The file's record and where each item stands in it.
    """
    output, stored = _Output(path), []
    try:
        with _without_zip_checksums():
            for item in items:
                offset = output.bytes
                value = _alone(item.value) if isinstance(item.value, torch.Tensor) else item.value
                torch.save(value, output)  # type: ignore[arg-type]
                stored.append(Stored(item.key, item.start, path.name, offset, output.bytes - offset))
        return output.finish(), stored
    except RuntimeError as error:
        # torch's writer complains of an unfinished archive, and hides what kept it from being finished
        raise output.error or error from None
    finally:
        output.close()


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, contiguous, over a storage of just its size; without a copy where it is so already."""
    tensor = tensor.detach().to("cpu").contiguous()
    size, first = tensor.numel() * tensor.element_size(), tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()
    if storage.nbytes() == size:
        return tensor
    return torch.empty(0, dtype=tensor.dtype).set_(storage[first : first + size], 0, tensor.shape)  # type: ignore[call-overload]


class TensorInfo(NamedTuple):
    """A tensor of a checkpoint: number format, whole shape, and its boxes with where they stand."""

    dtype: torch.dtype
    shape: Index
    chunks: list[tuple[Box, Stored]]


def write_index(folder: Path, tensors: dict[str, TensorInfo], objects: Iterable[Stored]) -> None:
    """Write what makes the `.distcp` files of a folder a checkpoint: `.metadata`, `metadata.json`, `common.pt`."""
    entries: dict[str, Any] = {}
    where: dict[MetadataIndex, _StorageInfo] = {}
    for key, info in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.size)) for box, _ in info.chunks]
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), chunks)
        for index, (box, stored) in enumerate(info.chunks):
            where[MetadataIndex(key, box.start, index)] = _StorageInfo(stored.file, stored.offset, stored.bytes)
    for stored in objects:
        entries[stored.key] = BytesStorageMetadata()
        where[MetadataIndex(stored.key)] = _StorageInfo(stored.file, stored.offset, stored.bytes)
    with open(folder / METADATA, "wb") as file:
        pickle.dump(Metadata(entries, storage_data=where, storage_meta=StorageMeta()), file)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backend |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend))
    torch.save({}, folder / "common.pt")


def _enum_member(kind: Any, name: str) -> Any:
    """What pickle's `getattr` is for: some versions of Python write a member of an enumeration in this way."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError(f"it asks for {name} of {kind}, which no checkpoint needs")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _Slice(io.RawIOBase):
    """A stretch of a file, read without a position of the file's own, so that threads can share the file."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._descriptor, self._offset, self._size, self._position = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._position))
        done = os.preadv(self._descriptor, [view[:count]], self._offset + self._position) if count else 0
        self._position += done
        return done


@dataclass
class _Job:
    """A stored box, and what is to be copied from it: target, and the box of the stored one."""

    stored: Stored
    copies: list[tuple[torch.Tensor, Box]] = field(default_factory=list)


class Reader:
    """The tensors of a checkpoint.

    Args:
        folder: the checkpoint.
        threads: that read at the same time; each holds one stored box in memory.

    Attributes:
        tensors: what there is, by name.

    Raises:
        DamagedCheckpointError: `.metadata` cannot be read, or names classes that it need not.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.folder, self._threads = folder, threads
        try:
            with open(folder / METADATA, "rb") as file:
                metadata = _Unpickler(file).load()
            self.tensors = dict(_tensors(metadata))
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, KeyError) as error:
            raise DamagedCheckpointError(folder, f"{METADATA}: {error}") from None

    def read(self, key: str) -> torch.Tensor:
        """A whole tensor, in its stored number format.

        Raises:
            KeyError: there is none of this name.
        """
        info = self.tensors[key]
        target = torch.empty(info.shape, dtype=info.dtype)
        self.load([Part(key, info.shape, (0,) * len(info.shape), target, (key,))])
        return target

    @torch.no_grad()
    def load(self, parts: Sequence[Part]) -> list[str]:
        """Fill parts from their sources, converting number formats.

        Returns:
            Names of optional parts that the checkpoint has nothing for.

        Raises:
            UserError: the checkpoint lacks a tensor, or has one of another shape.
            DamagedCheckpointError: boxes are missing or cannot be read.
        """
        jobs: dict[tuple[str, int], _Job] = {}
        left_out = []
        for part in parts:
            key = next((source for source in part.sources if source in self.tensors), None)
            if key is None and part.is_optional:
                left_out.append(part.key)
                continue
            if key is None:
                raise UserError(f"{self.folder} has no {part.sources[-1]}")
            self._plan(key, part, jobs)
        with ThreadPoolExecutor(self._threads) as pool:
            by_file: dict[str, list[_Job]] = {}
            for job in jobs.values():
                by_file.setdefault(job.stored.file, []).append(job)
            for name, group in by_file.items():
                self._read_file(name, group, pool)
        return sorted(set(left_out))

    def _plan(self, key: str, part: Part, jobs: dict[tuple[str, int], _Job]) -> None:
        info, box = self.tensors[key], part.box
        if info.shape != part.shape:
            raise UserError(f"{self.folder}: {key} has the shape {list(info.shape)}, this run's {list(part.shape)}")
        found = 0
        for chunk, stored in info.chunks:
            common = overlap(chunk, box)
            if common is not None:
                job = jobs.setdefault((stored.file, stored.offset), _Job(stored))
                target = part.tensor[common.relative_to(box.start).slices()]
                job.copies.append((target, common.relative_to(chunk.start)))
                found += common.numel
        if found != box.numel:
            raise DamagedCheckpointError(self.folder, f"parts of {key} are missing")

    def _read_file(self, name: str, jobs: list[_Job], pool: ThreadPoolExecutor) -> None:
        def read(job: _Job) -> None:
            source = _Slice(descriptor, job.stored.offset, job.stored.bytes)
            tensor = torch.load(source, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
            with torch.no_grad():
                for target, box in job.copies:
                    target.copy_(tensor[box.slices()])

        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
            try:
                list(pool.map(read, jobs))
            finally:
                os.close(descriptor)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, IndexError) as error:
            raise DamagedCheckpointError(self.folder, f"{name} cannot be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _tensors(metadata: Any) -> Iterator[tuple[str, TensorInfo]]:
    where = metadata.storage_data
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        chunks = []
        for chunk in entry.chunks:
            box, info = Box(tuple(chunk.offsets), tuple(chunk.sizes)), where[MetadataIndex(key, chunk.offsets)]
            if Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"it names the file {info.relative_path!r}, outside of the checkpoint")
            chunks.append((box, Stored(key, box.start, info.relative_path, info.offset, info.length)))
        yield key, TensorInfo(entry.properties.dtype, tuple(entry.size), chunks)
