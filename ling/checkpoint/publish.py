"""The last step of a save: everything to disk, and the folder gets its name. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from ling.checkpoint.folder import FileRecord, Manifest, record_of, write_manifest


def publish(partial: Path, folder: Path, manifest: Manifest, files: dict[str, FileRecord]) -> None:
    """Make a checkpoint of a folder in which everything but the manifest is: flush it to disk and give it its name.

    Args:
        files: records of those files that are known and on disk already.
    """
    names = (str(path.relative_to(partial)) for path in sorted(partial.rglob("*")) if path.is_file())
    manifest.files = {name: files.get(name) or record_of(partial / name) for name in names}
    write_manifest(partial, manifest)
    for path in partial.rglob("*"):
        if path.is_dir() or str(path.relative_to(partial)) not in files:
            _flush(path)
    _flush(partial)
    partial.rename(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
