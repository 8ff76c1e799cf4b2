"""Packages of the environment that a run cannot use: one line and code 2, before anything is written."""

from pathlib import Path

import pytest

from tests.e2e.cli import complete, start

BROKEN = "raise OSError('libcudart.so.12: cannot open')"
OLD_MEGATRON = {
    "megatron/core/__init__.py": "",
    "megatron/core/package_info.py": "VERSION = (0, 15, 3, '')",
    "megatron/core/models/gpt/__init__.py": "",
    "megatron/core/optimizer/__init__.py": "",
}


@pytest.mark.parametrize(
    ("files", "overrides", "expected"),
    [
        (
            {"flash_attn/__init__.py": BROKEN},
            ["runtime.attention=flash"],
            "runtime.attention=flash: flash_attn: broken: OSError: libcudart.so.12: cannot open; set runtime.at",
        ),
        (
            {"wandb/__init__.py": BROKEN},
            ["observe.wandb=offline"],
            "observe.wandb: wandb: broken: OSError: libcudart.so.12: cannot open; pip install wandb, or set observe.w",
        ),
        (
            OLD_MEGATRON,
            [],
            "megatron-core 0.15.3 is not supported: this version was never tried; pip install 'megatron-core>=0.16.1,",
        ),
    ],
    ids=["broken flash-attn", "broken wandb", "unsupported megatron-core"],
)
def test_packages(place, tmp_path, files, overrides, expected):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = names_in(place)
    command = ["train", "run.yaml", "run.dir=never", *overrides]
    done = complete(start(*command, cwd=place, PYTHONPATH=str(tmp_path)))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("ling: error: ")
    assert done.err.count("\n") == 1
    assert expected in done.err
    assert names_in(place) == before


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}
