"""`ling doctor`: what is installed, what this machine is, which implementation each operation will use, and why.

Everything here must work on a broken installation, so whatever needs a package is imported late and guarded.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

PYTHON = (3, 11)
MEGATRON = "megatron-core>=0.16.1,<0.20"  # as in ling.platform.megatron, which cannot be imported without torch
# distribution -> (module, lowest version)
REQUIRED: dict[str, tuple[str, tuple[int, ...]]] = {
    "torch": ("torch", (2, 10)),
    "numpy": ("numpy", ()),
    "omegaconf": ("omegaconf", (2, 4)),
    "PyYAML": ("yaml", ()),
    "sentencepiece": ("sentencepiece", (0, 2)),
    "einops": ("einops", ()),
    "psutil": ("psutil", ()),
}
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling doctor`."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 where `ling train` could run here, 1 where something must be mended first."""
    report = examine()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """All findings, as plain data: python, packages, optional, machine, operations, problems."""
    problems: list[str] = []
    if sys.version_info < PYTHON:
        problems.append(f"Python {platform.python_version()} is too old: ling needs 3.11 or newer")
    packages = [_required(name, problems) for name in REQUIRED]
    torch_works = next(row["problem"] is None for row in packages if row["name"] == "torch")
    all_work = not problems
    packages.append(_megatron(problems, all_work))
    optional = _optional() if all_work else []
    operations = _operations(problems) if all_work else []
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": packages,
        "optional": optional,
        "machine": _machine(torch_works),
        "operations": operations,
        "problems": problems,
    }


def render(report: dict[str, Any]) -> str:
    """The findings as text for people."""
    from ling.observe.console import table

    machine = report["machine"]
    memory = machine["memory_gib"]
    rows = [("python", report["python"]["version"], report["python"]["executable"])]
    rows += [(row["name"], row["version"] or "-", row["problem"] or row.get("build", "")) for row in report["packages"]]
    optional = [(row["name"], row["version"] or "-", row["problem"] or "usable") for row in report["optional"]]
    hardware = [
        (
            "cpu",
            f"{machine['cpu']}: {machine['cores']} cores, {' '.join(machine['cpu_features']) or 'no known features'}",
        ),
        ("memory", f"{memory:.1f} GiB" if memory is not None else "unknown"),
        *(("gpu", f"{gpu['name']}: {gpu['memory_gib']:.0f} GiB, sm_{gpu['capability']}") for gpu in machine["gpus"]),
    ]
    if not machine["gpus"]:
        hardware.append(("gpu", "none that torch can use"))
    operations = [(row["operation"], row["implementation"], row["reason"]) for row in report["operations"]]
    verdict = ["ling train can run here"]
    if report["problems"]:
        verdict = [f"{number}. {problem}" for number, problem in enumerate(report["problems"], start=1)]
    sections = (
        ("Installed", table(rows)),
        ("Optional packages", table(optional)),
        ("Machine", table(hardware)),
        ("Operations, with the defaults of `runtime`", table(operations)),
        ("To be mended before ling train can run" if report["problems"] else "Verdict", verdict),
    )
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections if lines)


def _required(name: str, problems: list[str]) -> dict[str, Any]:
    module, lowest = REQUIRED[name]
    wanted = f"{name}>={'.'.join(map(str, lowest))}" if lowest else name
    mend = f"pip install '{wanted}'"
    row: dict[str, Any] = {"name": name, "version": _version(name), "problem": None}
    try:
        imported = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # any exception of a broken installation
        row["problem"] = "not installed" if row["version"] is None else f"broken: {_describe(error)}"
        problems.append(f"{name} is {row['problem']}: {mend}{'' if row['version'] is None else ' --force-reinstall'}")
        return row
    row["version"] = str(getattr(imported, "__version__", row["version"]))
    if _key(row["version"]) < lowest:
        row["problem"] = f"too old, {wanted} is needed"
        problems.append(f"{name} {row['version']} is {row['problem']}: {mend}")
    if name == "torch":
        cuda = imported.version.cuda
        row["build"] = f"built for CUDA {cuda}" if cuda else "built without CUDA"
        if row["problem"] is None and not imported.distributed.is_available():
            row["problem"] = "built without torch.distributed"
            problems.append(f"torch is {row['problem']}: install a build that has it ({mend} --force-reinstall)")
    return row


def _megatron(problems: list[str], importable: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": "megatron-core", "version": _version("megatron-core"), "problem": None}
    mend = f"pip install '{MEGATRON}'"
    if row["version"] is None:
        row["problem"] = "not installed"
    elif importable:
        from ling.platform import megatron
        from ling.platform.optional import shield_megatron_import

        hidden = shield_megatron_import()
        if hidden:
            row["build"] = f"{', '.join(found.name for found in hidden)} hidden from it"
        if not megatron.OLDEST <= _key(row["version"]) < megatron.TOO_NEW:
            row["problem"] = "not supported"
        else:
            try:
                megatron.check_version()
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                row["problem"] = f"broken: {_describe(error)}"
                mend += " --force-reinstall"
    if row["problem"] is not None:
        problems.append(f"{' '.join(filter(None, ('megatron-core', row['version'])))} is {row['problem']}: {mend}")
    return row


def _optional() -> list[dict[str, Any]]:
    from ling.platform.optional import PACKAGES, find

    found = [find(name) for name in PACKAGES]
    return [{"name": row.name, "version": row.version, "problem": row.problem} for row in found]


def _operations(problems: list[str]) -> list[dict[str, str]]:
    """What the defaults of `runtime` and `precision.recipe=auto` would pick here."""
    try:
        from ling.config.schema import PrecisionConfig, RuntimeConfig
        from ling.platform import get_platform, select

        here = get_platform("auto")
        picked = select.choose(RuntimeConfig(), here.name)
        rows = [
            {"operation": choice.operation, "implementation": choice.implementation, "reason": choice.reason}
            for choice in picked.values()
        ]
        recipe = select.precision_recipe(PrecisionConfig(recipe="auto"), here)
        reason = f"bf16 matrices are {'' if here.bf16_is_fast() else 'not '}faster than fp32 ones on this device"
        rows.append({"operation": "precision", "implementation": recipe, "reason": f"recipe auto: {reason}"})
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a diagnosis must come to its end
        problems.append(f"no implementation could be chosen: {_describe(error)}")
        return []
    return rows


def _machine(torch_works: bool) -> dict[str, Any]:
    info = _read("/proc/cpuinfo")
    flags = set((re.search(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE) or [""] * 2)[1].split())
    model = (re.search(r"^model name\s*:(.*)$", info, re.MULTILINE) or [""] * 2)[1].strip()
    return {
        "cpu": model or platform.machine(),
        "cpu_features": [feature for feature in CPU_FEATURES if feature in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus() if torch_works else [],
    }


def _memory_gib() -> float | None:
    """Memory that this process may use: the machine's, or its control group's where that is less."""
    sizes = []
    if total := re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE):
        sizes.append(int(total[1]) / 2**20)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if (limit := _read(path).strip()).isdigit():
            sizes.append(int(limit) / 2**30)
    return min(sizes) if sizes else None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "memory_gib": gpu.total_memory / 2**30, "capability": f"{gpu.major}{gpu.minor}"}
        for gpu in properties
    ]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # not Linux, or not allowed
        return ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _key(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
