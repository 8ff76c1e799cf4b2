"""Optional packages that are absent, broken or impostors; each case in a process of its own with made-up packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ling.platform import optional

ROOT = Path(__file__).parents[2]


def packages(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def python(folder: Path, code: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(folder), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


REPORT = """
import json, sys
from ling.platform import optional
found = {name: optional.find(name) for name in optional.PACKAGES}
hidden = [item.name for item in optional.shield_megatron_import()]
assert hidden == [item.name for item in optional.shield_megatron_import()]
import megatron.core
from megatron.core.models.gpt import gpt_layer_specs as specs
print(json.dumps({
    "problems": {name: item.problem for name, item in found.items()},
    "usable": [name for name, item in found.items() if item.module is not None],
    "versions": {name: item.version for name, item in found.items()},
    "hidden": hidden,
    "have": [specs.HAVE_TE, specs.HAVE_APEX],
    "left": [name for name, module in sys.modules.items() if name.startswith("transformer_engine.") and module],
}))
"""


def test_every_kind_of_breakage_is_told_and_megatron_still_imports(tmp_path):
    folder = packages(
        tmp_path,
        {
            "transformer_engine/__init__.py": "raise FileNotFoundError('no core library\\nsecond line')",
            "flash_attn/__init__.py": "__version__ = '9.9'",
            "apex/__init__.py": "raise AssertionError('must not be imported')",
            "triton/__init__.py": "raise SystemExit(3)",
            "wandb/run-1/files.txt": "",
            "tokenizers/__init__.py": "class Panic(BaseException): pass\nraise Panic()",
            "transformers/__init__.py": "import ctypes; ctypes.CDLL('libnothing_of_that_name.so')",
            "tensorboard/__init__.py": "None.attribute",
        },
    )
    result = python(folder, REPORT)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    problems = report["problems"]
    assert problems["transformer_engine"] == "broken: FileNotFoundError: no core library"
    assert problems["flash_attn"] == "another package: it has no flash_attn_func"
    assert "web toolkit" in problems["apex"]
    assert problems["triton"] == "broken: SystemExit: 3"
    assert problems["wandb"].startswith("not installed, there is only a folder of its name: ")
    assert problems["tokenizers"] == "broken: Panic"
    assert problems["transformers"].startswith("broken: OSError: ")
    assert problems["tensorboard"].startswith("broken: AttributeError: ")
    broken = [name for name in problems if name != "matplotlib"]  # the only one not made up here
    assert not set(broken) & set(report["usable"])
    assert all("\n" not in problem for problem in problems.values() if problem)
    assert report["hidden"] == ["transformer_engine", "apex", "triton", "tensorboard", "wandb"]
    assert report["have"] == [False, False]


def test_what_a_failed_import_left_behind_is_hidden_too(tmp_path):
    folder = packages(
        tmp_path,
        {
            "transformer_engine/__init__.py": "__version__ = '2.0'",
            "transformer_engine/common/__init__.py": "",
            "transformer_engine/pytorch/__init__.py": "import transformer_engine.common\nNone.old_torch",
            "apex/__init__.py": "",
            "apex/optimizers/__init__.py": "class FusedAdam: pass",
            "amp_C.py": "raise OSError('libcudart.so: cannot open shared object file')",
        },
    )
    result = python(folder, REPORT)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (
        report["problems"]["transformer_engine"]
        == "broken: AttributeError: 'NoneType' object has no attribute 'old_torch'"
    )
    assert report["problems"]["apex"].startswith("broken: OSError: libcudart.so")
    assert report["hidden"][:2] == ["transformer_engine", "apex"]
    assert report["left"] == []
    assert report["have"] == [False, False]


def test_a_clone_of_apex_in_the_working_directory_is_not_taken_for_apex(tmp_path):
    result = python(packages(tmp_path, {"apex/setup.py": "", "apex/README.md": ""}), REPORT)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["problems"]["apex"].startswith("not installed, there is only a folder")
    assert report["hidden"] == ["apex"]
    assert report["have"] == [False, False]


def test_nvidias_apex_is_recognised_and_not_hidden(tmp_path):
    files = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "amp_C.py": ""}
    code = (
        "from ling.platform import optional\n"
        "found = optional.find('apex')\n"
        "assert found.problem is None and found.module.__name__ == 'apex' and found.visible, found\n"
        "assert 'apex' not in [item.name for item in optional.shield_megatron_import()]\n"
    )
    result = python(packages(tmp_path, files), code)
    assert result.returncode == 0, result.stderr


def test_without_the_shield_a_half_installed_transformer_engine_breaks_megatron(tmp_path):
    folder = packages(tmp_path, {"transformer_engine/__init__.py": "raise FileNotFoundError('no core library')"})
    result = python(folder, "import megatron.core")
    assert result.returncode != 0
    assert "FileNotFoundError" in result.stderr


def test_nothing_is_imported_before_it_is_asked_for(tmp_path):
    code = (
        "import sys\nfrom ling.platform import optional\n"
        "loaded = [name for name in optional.PACKAGES if name in sys.modules]\n"
        "assert loaded in ([], ['triton']), loaded\n"  # torch may import triton by itself
    )
    result = python(tmp_path, code)
    assert result.returncode == 0, result.stderr


def test_a_package_that_is_absent(monkeypatch):
    monkeypatch.setitem(
        optional.PACKAGES, "no_such_package", optional.Package(("no-such-package",), ("no_such_package",))
    )
    found = optional.find("no_such_package")
    assert found == optional.Found("no_such_package", None, None, "not installed")
    assert not found.visible


def test_a_package_that_works_is_found_once():
    found = optional.find("tensorboard")
    if found.problem == "not installed":
        pytest.skip("tensorboard is not installed")
    assert found.module is not None
    assert found.version
    assert optional.find("tensorboard") is found


def test_an_unknown_name_is_our_own_mistake():
    with pytest.raises(KeyError):
        optional.find("numpy")
