"""What a manifest says of the software that wrote it."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Versions of ling, torch and megatron-core."""
    import megatron.core

    import ling

    return {"ling": ling.__version__, "torch": torch.__version__, "megatron-core": megatron.core.__version__}


@cache
def git_commit() -> str | None:
    """The commit of ling's source, with `+` for uncommitted changes to it; None where it is no repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an installed package may lie inside of another repository
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout
