"""What the CUDA kernels became: registers, spills, and machine instructions per element, as a table.

    python kernels/bench/sass.py [--arch 90] [SOURCE ...]

Compiles sources of kernels/csrc (default: the bf16 and fp32 element-wise ones) for one architecture, without a GPU, and
reads the result with cuobjdump (of the CUDA toolkit, or of the packages nvidia-cuda-cuobjdump and -nvdisasm).
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
DEFAULT_SOURCES = tuple(f"elementwise_{way}_{kind}.cu" for kind in ("bf16", "f32") for way in ("forward", "backward"))
# of the pipes that compute in floating point; a MUFU is one of the special-function unit
FLOATING = ("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL", "FSET", "F2FP", "MUFU")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin.

    Attributes:
        name: without namespaces and math policies, such as `forward_kernel<PowLU, BF16>`.
        spills: bytes of registers that are stored to memory and loaded again.
        opcodes: how often each instruction stands in it, by its full name (`STG.E.128`).
    """

    name: str
    registers: int
    spills: int
    opcodes: collections.Counter[str]

    @property
    def elements(self) -> int:
        """Elements that one pass through its loop computes: sixteen bytes of them."""
        return 4 if "F32" in self.name else 8

    def count(self, pattern: str) -> int:
        """Instructions whose full name matches a regular expression from its start."""
        return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: of the path, $CUDA_HOME, the usual place, NVIDIA's package of it or triton's."""
    folders = [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME",) if key in os.environ]
    folders.append(Path("/usr/local/cuda/bin"))
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia and nvidia.submodule_search_locations) or ():
        folders += sorted(Path(folder).glob("cu*/bin"))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name)
    candidates = [folder / name for folder in folders]
    return found or next((str(path) for path in candidates if path.is_file()), None)


def compile_kernels(nvcc: str, flags: list[str], source: Path, arch: str, cubin: Path) -> str:
    """Compile one source to a cubin; what ptxas says about it.

    Raises:
        RuntimeError: it does not compile.
    """
    command = [nvcc, *flags, f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def read_kernels(cuobjdump: str, cubin: Path, log: str) -> list[Kernel]:
    """The kernels of a cubin and of ptxas's output about it."""
    dump = subprocess.run([cuobjdump, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    resources = {
        name: (int(registers), int(spills))
        for name, spills, registers in re.findall(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", log, re.DOTALL
        )
    }
    kernels = []
    for part in dump.split("Function : ")[1:]:
        mangled = part.split()[0]
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", part)
        registers, spills = resources[mangled]
        kernels.append(Kernel(short_name(mangled), registers, spills, collections.Counter(opcodes)))
    return sorted(kernels, key=lambda kernel: kernel.name)


def short_name(mangled: str) -> str:
    """`forward_kernel<PowLU, BF16>`: demangled, without namespaces, policies and arguments, functors by their names."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    for prefix in ("void ", "(anonymous namespace)::", "ling::", "generic::"):
        name = name.replace(prefix, "")
    name = name.split(">(")[0] + ">" if ">(" in name else name.split("(")[0]
    for policy in ("FastMath<DeviceIntrinsics>", "HostMath"):
        name = re.sub(rf"<{re.escape(policy)} ?>", "", name)
    name = name.replace(" >", ">").replace(", true>", ", backward>").replace(", false>", ", forward>")
    for alias, functor in functor_aliases().items():
        name = name.replace(functor, alias)
    return name


def functor_aliases() -> dict[str, str]:
    """`PowLU` -> `Gated<PowLUGate, Identity>` and so on, of functors.h."""
    text = (CSRC / "functors.h").read_text()
    found = re.findall(r"template <class Math> using (\w+) = (.*);", text)
    return {alias: functor.replace("<Math>", "") for alias, functor in found}


def table(kernels: list[Kernel]) -> str:
    """A Markdown table."""
    lines = [
        "| kernel | registers | spills | special functions | floating point | 16-byte loads / stores |",
        "|---|---|---|---|---|---|",
    ]
    for kernel in kernels:
        # one reciprocal belongs to a division of integers, outside the loop
        special = kernel.count(r"MUFU") / kernel.elements
        floating = sum(kernel.count(rf"{name}(\.|$)") for name in FLOATING) / kernel.elements
        wide = f"{kernel.count(r'LDG.*128')} / {kernel.count(r'STG.*128')}"
        name = kernel.name.replace("|", "")
        lines.append(f"| `{name}` | {kernel.registers} | {kernel.spills} | {special:.1f} | {floating:.1f} | {wide} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=DEFAULT_SOURCES, metavar="SOURCE", help="of kernels/csrc")
    parser.add_argument("--arch", default="90", help="compute capability (default: 90)")
    arguments = parser.parse_args()
    nvcc, cuobjdump = find_tool("nvcc"), find_tool("cuobjdump")
    if nvcc is None or cuobjdump is None:
        needed = "set CUDA_HOME, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        sys.exit(f"error: nvcc and cuobjdump are needed; {needed}")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        sys.exit("error: torch's headers are needed; install torch")
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-isystem", str(Path(torch.origin).parent / "include")]
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for source in arguments.sources:
            cubin = Path(folder) / f"{Path(source).stem}.cubin"
            log = compile_kernels(nvcc, flags, CSRC / Path(source).name, arguments.arch, cubin)
            kernels += read_kernels(cuobjdump, cubin, log)
    print(f"sm_{arguments.arch}; per element of the result, in the loop's body\n\n{table(kernels)}")


if __name__ == "__main__":
    main()
