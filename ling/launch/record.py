"""What was launched, kept in the run's folder: `job/launches/0001/` with all that is needed to do it again.

The job file, the resolved config, the environment without secrets, versions, and the commit and changes of ling's
source.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import ling
from ling.config import save_config
from ling.job.files import job_folder
from ling.launch.job import Job

HIDDEN = "(hidden)"
_SECRET = re.compile(
    r"TOKEN|SECRET|PASS(WORD|WD|PHRASE)?($|_)|CREDENTIAL|(^|_)(API_?)?KEYS?($|_)|(^|_)AUTH|COOKIE|SESSION|PRIVATE|NETRC",
    re.IGNORECASE,
)
_USER_IN_URL = re.compile(r"(\w+://)[^/@\s]+@")
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "numpy", "triton", "nvidia-nccl-cu13")
_GIT_TIMEOUT_S = 30


def record_launch(job: Job, text: str) -> Path:
    """Keep a launch; returns the path of its job file."""
    parent = job_folder(job.run_dir) / "launches"
    parent.mkdir(parents=True, exist_ok=True)
    folder = _next_folder(parent)
    path = folder / ("job.sbatch" if job.kind == "slurm" else "job.sh")
    path.write_text(text)
    path.chmod(0o755)
    save_config(job.config, folder / "config.yaml")
    shown = environment(os.environ)
    (folder / "environment.txt").write_text("".join(f"{name}={value}\n" for name, value in sorted(shown.items())))
    commit, diff = source_state()
    facts = {"command": job.command, "versions": versions(), "git_commit": commit}
    (folder / "versions.json").write_text(json.dumps(facts, indent=2) + "\n")
    if diff:
        (folder / "git.diff").write_text(diff)
    return path


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables without secrets: names that sound like one lose their value, URLs their user and password."""
    return {
        name: HIDDEN if _SECRET.search(name) else _USER_IN_URL.sub(r"\1", value.replace("\n", "\\n"))
        for name, value in variables.items()
        if not name.startswith("BASH_FUNC_")
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that training uses."""
    found = {"python": platform.python_version(), "ling": ling.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_state() -> tuple[str | None, str]:
    """The commit of ling's source and its uncommitted changes; None and nothing outside of a repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None, ""
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        untracked = _git(root, "ls-files", "--others", "--exclude-standard")
        names = "".join(f"untracked: {name}\n" for name in untracked.splitlines())
        return commit, _git(root, "diff", "HEAD") + names
    except (OSError, subprocess.SubprocessError):
        return None, ""


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "color.ui=false", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, timeout=_GIT_TIMEOUT_S, check=True)
    return done.stdout.decode(errors="replace")


def _next_folder(parent: Path) -> Path:
    number = 1 + max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0)
    while True:
        folder = parent / f"{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:  # another launch at the same moment
            number += 1
            continue
        return folder
