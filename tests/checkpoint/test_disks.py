"""Saves onto a disk that is full, or cannot be written. Skipped, visibly, where nothing can be mounted."""

import subprocess

import pytest
import torch

from ling.checkpoint.folder import read_manifest
from ling.checkpoint.start import newest_good
from ling.checkpoint.torch_dist import Item, write_file
from ling.checkpoint.writing import Job
from tests.checkpoint.files import make_run, mounted


def items(count: int) -> list[Item]:
    return [Item(f"x{number}", (0,), torch.full((250_000,), float(number))) for number in range(count)]


def test_a_full_disk(tmp_path):
    with mounted(tmp_path / "small", "size=4m") as disk:
        written = Job(disk, {"__0_0.distcp": items(3), "__0_1.distcp": items(3)}, read_back=False).wait()
        assert written.error == "OSError: No space left on device"
        for path in disk.iterdir():
            path.unlink()
        written = Job(disk, {"__0_0.distcp": items(3)}, read_back=True).wait()
        assert written.error is None
        assert written.files["__0_0.distcp"].bytes == (disk / "__0_0.distcp").stat().st_size


def test_a_disk_that_cannot_be_written(tmp_path):
    with mounted(tmp_path / "fixed", "size=4m,ro") as disk:
        written = Job(disk, {"__0_0.distcp": items(1)}, read_back=False).wait()
        assert written.error == "OSError: Read-only file system"
        with pytest.raises(OSError, match="Read-only"):
            write_file(disk / "file", items(1))


def test_a_checkpoint_is_read_from_such_a_disk(tmp_path):
    with mounted(tmp_path / "disk", "size=4m") as disk:
        (folder,) = make_run(disk, [2]).values()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert newest_good(disk, "always", print) == folder
        assert read_manifest(folder, "always").step == 2
