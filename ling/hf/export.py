"""A checkpoint of any layout to a Hugging Face model directory: in bounded memory, without a GPU, without a model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ling.checkpoint.folder import MANIFEST, TOKENIZER, Manifest, copy_tokenizer
from ling.checkpoint.parts import Part, state_key
from ling.checkpoint.restore import saved_config
from ling.checkpoint.torch_dist import Reader, TensorInfo
from ling.config.derived import padded_vocab_size
from ling.config.errors import UserError
from ling.config.schema import Config, ModelConfig
from ling.hf import shipped
from ling.hf.aside import ForeignRemainsError, check_room, written_aside
from ling.hf.config import hf_config
from ling.hf.names import Piece, by_source, canonical, checkpoint_shapes, keeps_fp32, pieces, segments
from ling.hf.safetensors import INDEX, SINGLE, Layout, Writer, plan
from ling.hf.tasks import Budget, Progress, Slab, run_all
from ling.hf.tokenizer import TokenizerFiles, tokenizer_files

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_PLAN = "export.json"


@dataclass(frozen=True)
class Options:
    """How to export.

    dtype: `bfloat16` or `float32` (fp32 master weights where the checkpoint has them); null: that of the run.
    max_shard_bytes: most bytes of tensors in one file.
    workers: threads that convert.
    """

    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    workers: int = 2


@dataclass
class Source:
    """A checkpoint, looked through: what to export, and under which names it stands there."""

    folder: Path
    manifest: Manifest
    config: Config
    reader: Reader
    dtype: str
    stored: dict[str, str]
    """The checkpoint's name of each tensor of `ling.hf.names`."""
    stacked: bool
    """Whether layers are stacked there, see `ling.hf.names.checkpoint_shapes`."""
    uses_masters: bool = False
    all_pieces: list[Piece] = field(default_factory=list)


def open_source(checkpoint: Path, dtype: str | None = None) -> Source:
    """Look through a checkpoint (or a run's newest).

    Raises:
        UserError: it is none, a tensor is missing or has another shape, or one is there that has no place.
    """
    folder, manifest, config = saved_config(checkpoint, "cpu")
    reader = Reader(folder)
    stacked = any(re.match(r"decoder\.layers\.(?!\d)", name) for name in reader.tensors)
    wanted = checkpoint_shapes(config.model, stacked)
    known = {canonical(name): name for name in reader.tensors if not name.startswith(("optimizer.", "rng_state"))}
    missing, unused = sorted(set(wanted) - set(known)), sorted(set(known) - set(wanted))
    for names, problem in ((missing, "lacks"), (unused, "has, but its config has no place for,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder} {problem} {names[0]}{more}; its config and its weights are of different models")
    for name, shape in wanted.items():
        found = reader.tensors[known[name]].shape
        if tuple(found) != tuple(shape):
            raise UserError(f"{folder}: {name} has the shape {list(found)}, its config says {list(shape)}")
    if dtype is None:
        stored = reader.tensors[known["embedding.word_embeddings.weight"]].dtype
        dtype = "bfloat16" if stored == torch.bfloat16 else "float32"
    source = Source(folder, manifest, config, reader, dtype, known, stacked)
    source.all_pieces = list(pieces(config.model, stacked))
    if dtype == "float32":
        masters = {name: state_key("param", stored) for name, stored in known.items()}
        masters = {name: stored for name, stored in masters.items() if stored in reader.tensors}
        source.stored, source.uses_masters = known | masters, bool(masters)
    return source


def export(
    checkpoint: Path,
    out: Path,
    options: Options = Options(),
    command: str = "",
    check: Callable[[Source, Path], None] | None = None,
) -> Source:
    """Write the model directory `out` from a checkpoint; it appears complete or not at all.

    What an interrupted export has finished is used when the same one is started again.

    Args:
        checkpoint: a checkpoint folder, or a run's (its newest).
        command: what the model card says this was made with.
        check: looks at the complete folder before it gets its name; what it raises keeps the folder from that.

    Returns:
        The checkpoint that was exported.

    Raises:
        UserError: not a checkpoint, a model that this form cannot express, `out` exists, no room on the disk, a weight
            that is not finite. Nothing is left behind then.
    """
    source = prepare(checkpoint, out, options)
    with written_aside(out) as partial:
        write(source, partial, options, command)
        if check is not None:
            check(source, partial)
        (partial / _PLAN).unlink()
    return source


def prepare(checkpoint: Path, out: Path, options: Options) -> Source:
    """Everything that can be refused before anything is written; see `export`."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder, or remove it")
    source = open_source(checkpoint, options.dtype)
    layout, _, _ = _contents(source, options)
    shipped.activation_file(source.config.model)
    check_room(out, sum(layout.sizes.values()))
    return source


def check_model(model: ModelConfig) -> None:
    """UserError where a model directory cannot express a model."""
    hf_config(model, "bfloat16", dict.fromkeys(("bos", "eos", "pad")))
    shipped.activation_file(model)


def check_run(config: Config) -> None:
    """UserError where the checkpoints of a run that has not begun yet could not be exported."""
    check_model(config.model)
    with TemporaryDirectory() as folder:
        copy_tokenizer(Path(config.data.tokenizer), Path(folder))
        _tokenizer_of(config.model, Path(folder), config.data.tokenizer)


def _tokenizer_of(model: ModelConfig, checkpoint: Path, where: object) -> TokenizerFiles:
    tokenizer = tokenizer_files(checkpoint / TOKENIZER, model.max_position_embeddings)
    rows = padded_vocab_size(model)
    if tokenizer.vocab_size > rows:
        raise UserError(f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}")
    return tokenizer


def _contents(source: Source, options: Options) -> tuple[Layout, TokenizerFiles, dict[str, Any]]:
    model = source.config.model
    tokenizer = _tokenizer_of(model, source.folder, source.folder)
    dtype = DTYPES[source.dtype]
    tensors = [
        (piece.name, torch.float32 if keeps_fp32(piece.name) else dtype, piece.shape) for piece in source.all_pieces
    ]
    return plan(tensors, options.max_shard_bytes), tokenizer, hf_config(model, source.dtype, tokenizer.tokens)


def write(source: Source, folder: Path, options: Options, command: str) -> None:
    """Fill the existing folder; files that are there whole stay."""
    layout, tokenizer, config = _contents(source, options)
    _check_plan(source, folder, layout)
    writer = Writer(folder, layout)
    try:
        _write_tensors(source, writer, options)
    finally:
        writer.close()
    files = tokenizer.files | shipped.files(source, config, command)
    if SINGLE not in layout.sizes:
        files[INDEX] = (json.dumps(layout.index_content, indent=1) + "\n").encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _check_plan(source: Source, folder: Path, layout: Layout) -> None:
    """Files of an interrupted export are used only where they are parts of this one."""
    headers = hashlib.sha256(b"".join(layout.headers.values())).hexdigest()
    ours = {"checkpoint": str(source.folder.resolve()), "step": source.manifest.step, "headers": headers}
    # its checksums are in it: a step that was done again has other weights at the same places
    ours["manifest"] = hashlib.sha256((source.folder / MANIFEST).read_bytes()).hexdigest()
    path = folder / _PLAN
    if path.is_file() and json.loads(path.read_text() or "{}") != ours:
        raise ForeignRemainsError(f"{folder} is what an interrupted export of something else has left; remove it")
    path.write_text(json.dumps(ours))


def _write_tensors(source: Source, writer: Writer, options: Options) -> None:
    grouped = by_source(source.all_pieces)
    slabs = []
    for name, group in grouped.items():
        info = source.reader.tensors[source.stored[name]]
        for slab in slabs_of(name, info):
            if any(writer.is_missing(each.piece.name) for each in segments(group, slab.first, slab.last)):
                slabs.append(slab)
    # a slab's bytes are those of the slab and of a stored box, at most twice the slab's own
    budget = Budget(max([2 * options.max_shard_bytes, *(slab.bytes for slab in slabs)]))
    progress = Progress("export", sum(slab.bytes for slab in slabs))

    def convert(slab: Slab) -> None:
        tensor = read_slab(source, slab)
        for segment in segments(grouped[slab.key], slab.first, slab.last):
            name = segment.piece.name
            if writer.is_missing(name):
                rows = segment.view(tensor, slab.first)
                dtype = torch.float32 if keeps_fp32(name) else DTYPES[source.dtype]
                writer.write(name, segment.row, rows.to(dtype))
        progress.add(slab.bytes)

    run_all(convert, slabs, options.workers, budget)


def slabs_of(key: str, info: TensorInfo) -> Iterator[Slab]:
    """A tensor's parts along its first dimension that no stored box crosses, so that each box is read once."""
    edges = {0, info.shape[0]}
    largest = 0
    for box, _ in info.chunks:
        edges |= {box.start[0], box.start[0] + box.size[0]}
        largest = max(largest, box.numel)
    inside = sorted(edges)
    for first, last in zip(inside, inside[1:], strict=False):
        if any(b.start[0] < first < b.start[0] + b.size[0] or b.start[0] < last < b.start[0] + b.size[0]
               for b, _ in info.chunks):  # fmt: skip
            yield Slab(key, 0, info.shape[0], _bytes(info.shape, info.dtype) + largest * info.dtype.itemsize)
            return
    for first, last in zip(inside, inside[1:], strict=False):
        size = _bytes((last - first, *info.shape[1:]), info.dtype)
        yield Slab(key, first, last, size + min(largest * info.dtype.itemsize, size))


def read_slab(source: Source, slab: Slab) -> torch.Tensor:
    """A slab as it is stored.

    Raises:
        UserError: it holds inf or nan.
    """
    stored = source.stored[slab.key]
    info = source.reader.tensors[stored]
    tensor = torch.empty((slab.last - slab.first, *info.shape[1:]), dtype=info.dtype)
    start = (slab.first, *(0 for _ in info.shape[1:]))
    source.reader.load([Part(stored, tuple(info.shape), start, tensor, (stored,))])
    low, high = tensor.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise UserError(f"{source.folder}: {slab.key} holds inf or nan; export an earlier checkpoint")
    return tensor


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size
