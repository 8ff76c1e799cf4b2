"""host_harness.cpp, compiled once per test run, and the project's build rules for tests that compile by themselves."""

import ctypes
import functools
import runpy
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "kernels" / "csrc"


@functools.cache
def build_rules() -> dict[str, Any]:
    """The names that setup.py defines, without running a build."""
    import setuptools

    original, setuptools.setup = setuptools.setup, lambda **_: None
    try:
        return runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def host_harness() -> ctypes.CDLL:
    """The compiled harness; skips the test where there is no compiler."""
    rules = build_rules()
    compiler = rules["find_compiler"]()
    if compiler is None:
        pytest.skip("no C++20 compiler")
    library = Path(_folder().name) / "harness.so"
    include = [f"-I{CSRC}", "-isystem", str(rules["find_torch"]() / "include")]
    source = Path(__file__).with_name("host_harness.cpp")
    command = [*compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", *include, str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(array: Any) -> ctypes.c_void_p:
    """The data of a tensor or of None."""
    return ctypes.c_void_p(None if array is None else array.data_ptr())
