"""What a checkpoint folder is: names, manifest, and which of them is the newest complete one. Torch-free."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ling.config.errors import UserError

FORMAT = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
BESIDE_TOKENIZER = ("ling_tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5", ".git")
VERIFY_LEVELS = ("always", "manifest", "never")
_NAME = re.compile(r"step_(\d{8,})")
_BLOCK_BYTES = 1 << 22


class DamagedCheckpointError(UserError):
    """A checkpoint is incomplete, or its files are not those that were written; `problem` says what is wrong."""

    def __init__(self, folder: Path, problem: str) -> None:
        super().__init__(f"{folder} is damaged: {problem}; use an older checkpoint")
        self.problem = problem

    def __reduce__(self) -> Any:  # ranks tell each other of it
        return _unpickled, (str(self), self.problem)


def _unpickled(text: str, problem: str) -> DamagedCheckpointError:
    error = DamagedCheckpointError(Path(), problem)
    error.args = (text,)
    return error


@dataclass
class FileRecord:
    """Size of a file in bytes and the CRC-32 (zlib's, 8 hexadecimal digits) of its content; format 1 had no CRC."""

    bytes: int
    crc32: str | None = None


@dataclass
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step, consumed_samples: updates made, and the samples that they have seen (the position in the data).
        config: the resolved config of the run that saved it.
        world_size: ranks that wrote it; the layout is in the config.
        loss: of the last step.
        optimizer_step: updates counted by the optimizer (for Adam's bias correction); None: no optimizer state.
        origin: `{checkpoint, step}` that the run began from (`checkpoint.load`), or None.
        merged: `[{checkpoint, step, weight}]` of a merged checkpoint, else None.
        random_states: whether there is a file of random states for each rank.
        git_commit: of ling's source, with `+` for uncommitted changes; None outside of a repository.
        saved_at: seconds since 1970, for display only.
        files: every other file of the folder.
    """

    step: int
    consumed_samples: int
    config: dict[str, Any]
    world_size: int
    versions: dict[str, str]
    loss: float | None = None
    optimizer_step: int | None = None
    origin: dict[str, Any] | None = None
    merged: list[dict[str, Any]] | None = None
    random_states: bool = False
    git_commit: str | None = None
    saved_at: float | None = None
    format: int = FORMAT
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of the checkpoint."""
        return sum(record.bytes for record in self.files.values())


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it is renamed to `folder`."""
    return folder.with_name(f".{folder.name}.partial")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Complete a checkpoint: write the manifest, with a checksum of its own, last."""
    values = asdict(manifest)
    values["crc32"] = _own_crc32(values)
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.rename(folder / MANIFEST)


def _own_crc32(values: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Put a copy of a tokenizer (a folder or a file) into a checkpoint; weights that lie beside it stay behind."""
    target = folder / TOKENIZER
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, target, ignore=shutil.ignore_patterns(*WEIGHTS))
        return
    target.mkdir()
    shutil.copy(tokenizer, target / ("tokenizer.model" if tokenizer.suffix == ".model" else tokenizer.name))
    for name in BESIDE_TOKENIZER:
        if tokenizer.with_name(name).is_file():
            shutil.copy(tokenizer.with_name(name), target / name)


def read_manifest(folder: Path, verify: str = "manifest") -> Manifest:
    """The manifest of a complete checkpoint.

    Args:
        folder: the checkpoint.
        verify: `always`: every file has the size and the checksum that the manifest notes; `manifest`: the size;
            `never`: no file is looked at.

    Raises:
        DamagedCheckpointError: the manifest is missing or damaged, or files are.
        UserError: the checkpoint was written by a newer ling.
    """
    manifest = _parse(folder)
    problem = None if verify == "never" else find_damage(folder, manifest, manifest.files, checksums=verify == "always")
    if problem:
        raise DamagedCheckpointError(folder, problem)
    return manifest


def _parse(folder: Path) -> Manifest:
    try:
        values = json.loads((folder / MANIFEST).read_text())
        number = values.get("format", 1)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpointError(folder, f"it has no {MANIFEST}, so it was not completed") from None
    except (ValueError, AttributeError) as error:  # AttributeError: no JSON object
        raise DamagedCheckpointError(folder, f"{MANIFEST}: {error}") from None
    if isinstance(number, int) and number > FORMAT:
        raise UserError(f"{folder} has checkpoint format {number}, this ling reads up to {FORMAT}; upgrade ling")
    try:
        crc32 = values.pop("crc32", None)
        if number != 1 and crc32 != _own_crc32(values):
            raise ValueError("its checksum is not that of its content")
        files = values.pop("files")
        records = {name: FileRecord(entry) if number == 1 else FileRecord(**entry) for name, entry in files.items()}
        known = {name: value for name, value in values.items() if name in Manifest.__dataclass_fields__}
        manifest = Manifest(**known, files=records)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(folder, f"{MANIFEST}: {error}") from None
    if manifest.format == 1:
        manifest.optimizer_step = manifest.step  # format 1 always held the optimizer
    return manifest


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str], *, checksums: bool) -> str | None:
    """What is wrong with the first damaged one of these files of a checkpoint, or None."""
    for name in names:
        record, path = manifest.files[name], folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != record.bytes:
            return f"{name} has {size} bytes, not {record.bytes}"
        if checksums and record.crc32 is not None:
            try:
                found = crc32_of(path)
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
            if found != record.crc32:
                return f"{name} has the checksum {found}, not {record.crc32}"
    return None


def crc32_of(path: Path) -> str:
    """CRC-32 of a file's content."""
    crc32, block = 0, memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            crc32 = zlib.crc32(block[:count], crc32)
    return f"{crc32:08x}"


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file as it is now."""
    return FileRecord(path.stat().st_size, crc32_of(path))


def step_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of everything that bears the name of a checkpoint, complete or not, by step."""
    found = ((_NAME.fullmatch(path.name), path) for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of every checkpoint with a manifest, by step (never by time: clocks go wrong)."""
    return [(step, path) for step, path in step_folders(run_dir) if (path / MANIFEST).is_file()]


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = checkpoints(run_dir)
    return found[-1][1] if found else None


def damaged_folders(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that were set aside."""
    return sorted((run_dir / "checkpoints").glob("step_*.damaged*"))


def set_aside(folder: Path, mark: str = "damaged") -> Path:
    """Rename a damaged or superseded folder, so that nothing takes it for a good one; returns its new path."""
    target, number = folder.with_name(f"{folder.name}.{mark}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.{mark}{number}")
    return folder.rename(target)


def resolve(path: Path) -> Path:
    """A checkpoint folder from what a user names: the checkpoint, or a run's folder (its newest).

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    if not path.exists():
        raise UserError(f"{path} does not exist; name a checkpoint folder or a run's folder")
    found = newest(path)
    if found is None:
        raise UserError(f"{path} is no checkpoint and has none under checkpoints/; name a folder like step_00000100")
    return found
