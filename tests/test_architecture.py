"""Imports point one way, and files and functions stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "ling").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
# A larger number for one file needs its reason beside it.
FILE_BUDGETS: dict[str, int] = {}

EVERYTHING = {"*"}
# part of ling -> the parts that it may import; every part may import itself and config.errors
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "cli": {"config"},
    "config": set(),  # and activations.table
    "commands": EVERYTHING,
    "activations": {"config"},
    "platform": {"activations", "config"},
    "parallel": {"platform", "config"},
    "model": {"activations", "parallel", "platform", "config"},
    "data": {"config", "parallel", "platform"},
    "optim": {"config", "parallel", "platform"},
    "checkpoint": {"model", "data", "optim", "parallel", "platform", "config"},
    "hf": {"checkpoint", "data", "model", "activations", "parallel", "platform", "config"},
    "observe": {"activations", "model", "parallel", "platform", "config"},
    "job": {"config", "observe", "checkpoint"},
    "plan": {"config", "model", "parallel"},
    "launch": {"config", "model", "parallel", "platform", "plan", "job", "checkpoint", "observe"},
    "trainer": EVERYTHING,
    "train": EVERYTHING,
}
MEGATRON = {"platform", "parallel", "model", "data", "optim", "checkpoint", "commands", "trainer", "train"}
TORCH_FREE = {"__init__", "__main__", "cli", "config"}
TORCH_FREE_TABLES = {"ling.activations.table"}
TRAINERS_USERS = {"train", "commands"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def part_of(module: str) -> str:
    """`ling.model.build` belongs to `model`."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, those inside functions too."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}"
                yield target if is_module(target) else base


def is_module(name: str) -> bool:
    """Whether a name imported from a package is a module: those of ling by their files, others by spelling."""
    path = ROOT.joinpath(*name.split("."))
    if name.startswith("ling."):
        return path.with_suffix(".py").is_file() or path.is_dir()
    return name.startswith("megatron.") and name.rsplit(".", 1)[-1] == "parallel_state"


def is_allowed(importer: str, imported: str) -> bool:
    part, target = part_of(importer), part_of(imported)
    if imported in ("ling", "ling.config.errors") or target == part:
        return True
    if part == "config" and imported in TORCH_FREE_TABLES:
        return True
    if target in ("trainer", "train"):
        return part in TRAINERS_USERS
    return bool(ALLOWED[part] & {target, "*"})


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_part_has_its_place():
    unknown = {part_of(module_name(path)) for path in FILES} - set(ALLOWED)
    assert not unknown, f"say in ALLOWED what {unknown} may import"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    module = module_name(path)
    part = part_of(module)
    for imported in imports(path):
        top = imported.split(".")[0]
        if top == "ling":
            assert is_allowed(module, imported), f"{module} must not import {imported}"
        elif top == "megatron":
            assert part in MEGATRON, f"{module} must not import megatron"
            is_state = imported.startswith("megatron.core.parallel_state")
            assert not is_state or part == "parallel", f"{module}: only ling.parallel may import parallel_state"
        elif top == "torch":
            torch_free = part in TORCH_FREE or module in TORCH_FREE_TABLES
            assert not torch_free, f"{module} must not import torch"
        assert top not in ("tests", "tools", "scripts"), f"{module} must not import {imported}"


def test_configs_and_tables_load_without_torch():
    program = "import sys, ling.cli, ling.config, ling.activations.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_functions_are_annotated(path):
    for function in functions(ast.parse(path.read_text())):
        if function.name.startswith("_"):
            continue
        a = function.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
        bare = [arg.arg for arg in arguments if arg.annotation is None and arg.arg not in ("self", "cls")]
        assert not bare, f"{name_of(path)}: {function.name} does not annotate {bare}"
        assert function.returns is not None, f"{name_of(path)}: {function.name} does not annotate its result"


def budgeted_files() -> list[Path]:
    folders = ("ling", "tests", "tools", "kernels")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", budgeted_files(), ids=name_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    budget = FILE_BUDGETS.get(name_of(path), MAX_FILE_LINES)
    assert len(text.splitlines()) <= budget, f"{name_of(path)} has more than {budget} lines"
    tree = ast.parse(text)
    for function in functions(tree):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= MAX_FUNCTION_LINES, f"{name_of(path)}: {function.name} has {lines} lines"
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), f"{name_of(path)} uses global"
