"""The safetensors format: planning and writing of files whose tensors come in any order, and reading of parts.

A file is 8 bytes of header length, a JSON header, and the tensors' bytes one after the other. The header follows from
names and shapes, so a file can be laid out before any tensor is there, and no tensor waits in memory for another.
Source: the format's description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ling.config.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_LARGEST_HEADER = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """A tensor in a file: its first byte is `offset` from the beginning of the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Size of what one index of the first dimension holds."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Layout(NamedTuple):
    """Files to write: each one's header (with the 8 bytes before it) and size, and where each tensor stands."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    entries: dict[str, Entry]

    @property
    def index_content(self) -> dict[str, Any]:
        """The content of model.safetensors.index.json."""
        total = sum(entry.bytes for entry in self.entries.values())
        weight_map = {name: self.entries[name].file for name in sorted(self.entries)}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}


Tensor = tuple[str, torch.dtype, tuple[int, ...]]


def plan(tensors: Iterable[Tensor], max_bytes: int) -> Layout:
    """Share tensors out over files of at most `max_bytes` of tensors (or one larger tensor), in the order given."""
    groups: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor[2]) * tensor[1].itemsize
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    layout = Layout({}, {}, {})
    for number, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _add_file(layout, file, group)
    return layout


def _add_file(layout: Layout, file: str, tensors: list[Tensor]) -> None:
    words = {dtype: name for name, dtype in _NAMES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):  # keeps each aligned
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": words[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    layout.headers[file] = len(text).to_bytes(8, "little") + text
    layout.sizes[file] = 8 + len(text) + position
    for name, dtype, shape in tensors:
        layout.entries[name] = Entry(file, dtype, shape, 8 + len(text) + header[name]["data_offsets"][0])


class Writer:
    """Writes the files of a layout; parts of tensors come in any order, from any thread.

    A file bears its name only when it is whole and on disk, so what is there need not be written again.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder, self._layout = folder, layout
        self._lock = threading.Lock()
        self.missing = {
            file: size - len(layout.headers[file])
            for file, size in layout.sizes.items()
            if not (folder / file).is_file() or (folder / file).stat().st_size != size
        }
        self._open: dict[str, int] = {}

    def is_missing(self, name: str) -> bool:
        """Whether a tensor has still to be written."""
        return self._layout.entries[name].file in self.missing

    def write(self, name: str, row: int, part: torch.Tensor) -> None:
        """Write rows of a tensor from `row` on; `part` has the tensor's dtype."""
        entry = self._layout.entries[name]
        data = part.contiguous().view(-1).view(torch.uint8).numpy().data
        descriptor, position = self._descriptor(entry.file), entry.offset + row * entry.row_bytes
        while data:
            count = os.pwrite(descriptor, data, position)
            data, position = data[count:], position + count
        with self._lock:
            self.missing[entry.file] -= part.nbytes
            complete = self.missing[entry.file] == 0
        if complete:
            self._finish(entry.file)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                path = self._folder / f"{file}.part"
                self._open[file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                os.truncate(path, self._layout.sizes[file])
                os.pwrite(self._open[file], self._layout.headers[file], 0)
            return self._open[file]

    def _finish(self, file: str) -> None:
        with self._lock:
            descriptor = self._open.pop(file)
        os.fsync(descriptor)
        os.close(descriptor)
        (self._folder / f"{file}.part").rename(self._folder / file)
        with self._lock:
            del self.missing[file]

    def close(self) -> None:
        """Give up what is not finished."""
        while self._open:
            os.close(self._open.popitem()[1])


class Reader:
    """The tensors of a model directory's safetensors files.

    Raises:
        UserError: there are none, one is damaged, or a number format is not one of weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for file in self._files():
            for name, entry in self._entries_of(file):
                if name in self.entries:
                    raise UserError(f"{folder}: {name} is in {self.entries[name].file} and in {file}; remove one")
                self.entries[name] = entry
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}

    def _files(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            try:
                files = sorted(set(json.loads((self.folder / INDEX).read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{self.folder / INDEX} is damaged ({error!r}); fetch it anew") from None
            bad = [file for file in files if not isinstance(file, str) or Path(file).name != file]
            if bad:
                raise UserError(f"{self.folder / INDEX} names {bad[0]!r}, outside of the folder")
            return files
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        raise UserError(f"{self.folder} has no {SINGLE} and no {INDEX}; is it half a download or half an export?")

    def _entries_of(self, file: str) -> Iterator[tuple[str, Entry]]:
        path = self.folder / file
        try:
            size = path.stat().st_size
            with open(path, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                    raise ValueError("it is shorter than its header says")
                header = json.loads(stream.read(length))
            for name, value in header.items():
                if name == "__metadata__":
                    continue
                if value["dtype"] not in _NAMES:
                    raise UserError(f"{path}: {name} is {value['dtype']}; quantised weights cannot be read")
                first, last = value["data_offsets"]
                entry = Entry(file, _NAMES[value["dtype"]], tuple(value["shape"]), 8 + length + first)
                if last - first != entry.bytes or entry.offset + entry.bytes > size or first < 0:
                    raise ValueError(f"the bytes of {name} are not all there")
                yield name, entry
        except FileNotFoundError:
            raise UserError(f"{path} is missing, but {INDEX} names it; fetch or export it anew") from None
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error}; fetch or export it anew") from None

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        entry = self.entries[name]
        target = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_rows(name, 0, target)
        return target

    def read_rows(self, name: str, row: int, target: torch.Tensor) -> None:
        """Fill `target`, contiguous and of the tensor's dtype, with the rows from `row` on."""
        entry = self.entries[name]
        data = target.view(-1).view(torch.uint8).numpy().data
        position = entry.offset + row * entry.row_bytes
        with self._lock:
            if entry.file not in self._open:
                self._open[entry.file] = os.open(self.folder / entry.file, os.O_RDONLY)
        while data:
            count = os.preadv(self._open[entry.file], [data], position)
            if count == 0:
                raise UserError(f"{self.folder / entry.file} ends before {name} does; fetch or export it anew")
            data, position = data[count:], position + count

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])
