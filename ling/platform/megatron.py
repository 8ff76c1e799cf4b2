"""Which megatron-core is supported, and the error that says how to get one."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings
from typing import Any

from ling.config.errors import UserError

OLDEST = (0, 16, 1)
TOO_NEW = (0, 20)
REQUIREMENT = "megatron-core>=0.16.1,<0.20"


def version() -> tuple[int, ...]:
    """The version of the megatron-core that Python would import, e.g. `(0, 16, 1)`.

    Raises:
        UserError: it is not installed.
    """
    try:
        package_info = _quiet_import("megatron.core.package_info")
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing == "megatron":
            raise UserError(f"megatron-core is not installed; pip install '{REQUIREMENT}'") from None
        raise UserError(f"megatron-core needs {missing}, which is not installed; pip install {missing}") from None
    return tuple(int(part) for part in package_info.VERSION[:3])


def _quiet_import(name: str) -> Any:
    """Import without megatron-core's remarks on optional packages: `ling doctor` says that better."""
    root_level = logging.getLogger().level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
    logging.getLogger().setLevel(root_level)
    return module


def installed_version() -> str | None:
    """The version that pip knows of, without importing megatron-core; None where it is not installed."""
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_version() -> None:
    """Import megatron-core, refusing one that `ling` was not proved with.

    Raises:
        UserError: not installed, too old or too new.
    """
    found = version()
    if not OLDEST <= found < TOO_NEW:
        raise unsupported("this version was never tried")
    for name in ("megatron.core.models.gpt", "megatron.core.optimizer"):
        _quiet_import(name)
    mend_norm_recompute()


def mend_norm_recompute() -> None:
    """Let megatron-core recompute norms without Transformer Engine.

    Its `CheckpointWithoutOutput(fp8=False)` takes False for "FP8 is on" (it asks `fp8 is not None`), as its own layers
    call it, and then calls a Transformer Engine that is not there (0.16.1). None says what False means.
    """
    random = _quiet_import("megatron.core.tensor_parallel.random")
    if not random.HAVE_TE:
        random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def unsupported(why: str) -> UserError:
    """The error for a megatron-core that cannot be used, with the reason and the mend."""
    text = ".".join(str(part) for part in version())
    return UserError(f"megatron-core {text} is not supported: {why}; pip install '{REQUIREMENT}'")
