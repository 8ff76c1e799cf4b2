"""What a checkpoint folder is: names, manifest, and which of them is the newest complete one. Torch-free."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ling.config.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
_NAME = re.compile(r"step_(\d{8})")


@dataclass
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    consumed_samples: int
    config: dict[str, Any]
    world_size: int
    versions: dict[str, str]
    loss: float | None = None
    format: int = FORMAT
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of every file of the checkpoint."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Complete a checkpoint: list its files and write the manifest last."""
    manifest.files = {
        str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    partial.rename(folder / MANIFEST)


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Put a copy of a tokenizer (a folder or a file) into a checkpoint."""
    target = folder / TOKENIZER
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, target)
    else:
        target.mkdir()
        shutil.copy(tokenizer, target / ("tokenizer.model" if tokenizer.suffix == ".model" else tokenizer.name))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint.

    Raises:
        UserError: the folder is no checkpoint of ours, or files are missing or have another size.
    """
    try:
        values = json.loads((folder / MANIFEST).read_text())
        manifest = Manifest(**values)
    except FileNotFoundError:
        raise UserError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error}") from None
    if manifest.format > FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {manifest.format}, this ling reads up to {FORMAT}; upgrade ling"
        )
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{folder} is damaged: {name} is missing or not {size} bytes long; use an older checkpoint")
    return manifest


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of every checkpoint with a manifest, oldest first."""
    found = []
    for path in (run_dir / "checkpoints").glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = checkpoints(run_dir)
    return found[-1][1] if found else None


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
