"""Packages that `ling` uses where they are installed: the only place that imports them.

A broken installation does not always raise ImportError: a half-installed Transformer Engine raises FileNotFoundError, a
missing NCCL OSError, a package built against another version AttributeError. So every import here is lazy and guarded
against any exception, and the reason why something is not used is kept in words.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ABSENT = "not installed"
# What megatron-core imports at its own import, guarded against ImportError only.
MEGATRON_IMPORTS = ("transformer_engine", "apex", "flash_attn", "triton", "tensorboard", "wandb")
# Compiled modules of a package that megatron-core imports by their own names.
EXTENSIONS = {"transformer_engine": ("transformer_engine_torch",), "apex": ("amp_C",)}


@dataclass(frozen=True)
class Found:
    """What is known of an optional package: either `module` or `problem` is given."""

    name: str
    version: str | None
    module: ModuleType | None
    problem: str | None

    @property
    def visible(self) -> bool:
        """Whether Python finds something of that name, be it broken, another package or a mere folder."""
        return self.problem != ABSENT


@dataclass(frozen=True)
class Package:
    """How an optional package is recognised.

    `distributions` are its names in the package index, `modules` what must import, in that order, `attribute` what the
    package itself must have.
    """

    distributions: tuple[str, ...]
    modules: tuple[str, ...]
    attribute: str | None = None


PACKAGES: dict[str, Package] = {
    # torch first: without it Transformer Engine does not find the libraries that come with torch
    "transformer_engine": Package(
        ("transformer-engine", "transformer-engine-torch"),
        ("torch", "transformer_engine", "transformer_engine.pytorch"),
    ),
    "flash_attn": Package(("flash-attn",), ("flash_attn",), attribute="flash_attn_func"),
    "apex": Package(("apex",), ("apex", "amp_C", "apex.optimizers")),
    "triton": Package(("triton",), ("triton",)),
    "tensorboard": Package(("tensorboard",), ("tensorboard", "torch.utils.tensorboard")),
    "wandb": Package(("wandb",), ("wandb",), attribute="init"),
    "matplotlib": Package(("matplotlib",), ("matplotlib", "matplotlib.figure")),
    "tokenizers": Package(("tokenizers",), ("tokenizers",), attribute="Tokenizer"),
    "transformers": Package(("transformers",), ("transformers",)),
}


@functools.cache
def find(name: str) -> Found:
    """Import an optional package, once, and say what came of it; never raises for a known `name`."""
    package = PACKAGES[name]
    version = _version(package.distributions)
    missing = _missing(name)
    if missing:
        return Found(name, version, None, missing)
    if name == "apex" and _is_other_apex():
        other = f"PyPI's apex {version or ''}".rstrip()
        return Found(
            name, version, None, f"another package: {other} is a web toolkit; NVIDIA's is built from its sources"
        )
    try:
        for required in package.modules:
            importlib.import_module(required)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit, and the panics of Rust extensions, which are no Exception
        return Found(name, version, None, f"broken: {describe(error)}")
    module = sys.modules[name]
    if package.attribute is not None and not hasattr(module, package.attribute):
        return Found(name, version, None, f"another package: it has no {package.attribute}")
    return Found(name, version or _version_of_module(module), module, None)


def describe(error: BaseException) -> str:
    """One line for an exception: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


@functools.cache
def shield_megatron_import() -> tuple[Found, ...]:
    """Hide from megatron-core what would break its import or mislead it; to be called before megatron.core is imported.

    megatron-core takes any importable `apex` for NVIDIA's, and fails itself when one of these packages raises anything
    but ImportError. A name that maps to None in sys.modules raises ImportError instead. Returns what was hidden,
    with the reason in `problem`.
    """
    hidden = []
    for name in MEGATRON_IMPORTS:
        found = find(name)
        if found.problem is None or not found.visible:
            continue
        if name == "flash_attn" and not found.problem.startswith("broken"):
            continue  # flash-attn-4 alone: torch imports it from that folder, and megatron-core is not misled
        roots = (name, *EXTENSIONS.get(name, ()))
        for module in list(sys.modules):
            if module.split(".")[0] in roots:
                del sys.modules[module]  # an `import a.b` does not ask for `a` where `a.b` is left from a failed import
        for root in roots:
            sys.modules[root] = None  # type: ignore[assignment]
        hidden.append(found)
    return tuple(hidden)


def _version(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _version_of_module(module: ModuleType | None) -> str | None:
    version = getattr(module, "__version__", None)
    return str(version) if version is not None else None


def _missing(name: str) -> str | None:
    """Why no package `name` can be imported, from its spec alone: nothing of it runs."""
    spec = _spec(name)
    if spec is None:
        return ABSENT
    if spec.origin is None and spec.submodule_search_locations is not None:
        # a run's folder wandb/, or a clone of apex, in the working directory imports as an empty namespace package
        folder = next(iter(spec.submodule_search_locations), "?")
        return f"not installed, there is only a folder of its name: {folder}"
    return None


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module in sys.modules without a spec
        return None


def _is_other_apex() -> bool:
    """NVIDIA's apex has `apex.optimizers`; nothing is imported to find out."""
    spec = _spec("apex")
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    return not any((Path(folder) / "optimizers").is_dir() for folder in folders)
