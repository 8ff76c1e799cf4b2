"""`run.plugins`: Python files or modules of the user's, imported before anything else of a run is looked at."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ling.config.errors import UserError


def load_plugins(plugins: Sequence[str]) -> None:
    """Import each of them, once per process; such as a file that registers an activation.

    Args:
        plugins: paths of `.py` files, relative to the working directory, or names of importable modules.

    Raises:
        UserError: one is not there, or raises an error of any kind; the message names it and the line.
    """
    for plugin in plugins:
        is_file = plugin.endswith(".py") or "/" in plugin
        if is_file and not Path(plugin).is_file():
            raise UserError(
                f"run.plugins: {plugin}: no such file in {Path.cwd()}; check the path, which is relative to the folder "
                "that the command is started in"
            )
        try:
            _import_file(Path(plugin).resolve()) if is_file else importlib.import_module(plugin)
        except Exception as error:  # whatever the user's code raises
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if not is_file and missing and f"{plugin}.".startswith(f"{missing}."):
                raise UserError(
                    f"run.plugins: there is no module {plugin}; install it, or give a file: path/to/{plugin}.py"
                ) from None
            raise _failure(plugin, error) from error


@cache
def _import_file(path: Path) -> None:
    name = f"ling_plugin_{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # two files may have the same name
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError("is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _failure(plugin: str, error: Exception) -> UserError:
    file = str(Path(plugin).resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return UserError(f"run.plugins: {plugin}{f', line {line}' if line else ''}: {text}")
