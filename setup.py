"""Build entry point: makes ling/_C_cpu.so and ling/_C_cuda.so of kernels/csrc; the metadata stands in pyproject.toml.

Both are plain shared libraries on torch's stable ABI: they need torch's headers to compile and load on any torch from
2.10 on. The CPU's is built where a C++20 compiler is, CUDA's where nvcc is and torch is a CUDA build; LING_BUILD_CUDA=1
or 0 forces the latter. What is missing is a warning and no library; what does not compile fails the installation.
Objects are kept in build/kernels under a digest of what they come from, so that only changes compile again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "kernels" / "csrc"
OBJECTS = ROOT / "build" / "kernels"
TARGET = "-DTORCH_TARGET_VERSION=(((0ULL+2)<<56)|((0ULL+10)<<48))"
# not -ffast-math: infinity, NaN and the order of operations mean something
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", f"-ffile-prefix-map={ROOT}/="),
    "-fno-thread-jumps",  # GCC would compute both sides of a clamp, the constant one with slow denormal results
]
# instruction set -> flags; cpu_kernels.cpp is compiled once for each
X86_VARIANTS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
GPU_ARCHITECTURES = ("80", "90", "100")  # and PTX of the last, for what comes after


def find_torch() -> Path | None:
    """The folder of the torch to build for: where pip isolates the build, that of the environment it installs into."""
    candidates = [Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("platlib", "purelib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        candidates.insert(0, Path(spec.origin).parent)
    return next((path for path in candidates if (path / "include/torch/csrc/stable/library.h").is_file()), None)


def find_compiler() -> list[str] | None:
    """A compiler of C++20, as a command: $CXX, or the first that works."""
    program = b"#include <concepts>\n#include <optional>\nstatic_assert(std::integral<int>);\n"
    for command in (shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            check = [*command, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
            if subprocess.run(check, input=program, capture_output=True, check=False).returncode == 0:
                return command
    return None


def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME, of the path, or of the usual place."""
    home = os.environ.get("CUDA_HOME")
    found = [Path(home) / "bin" / "nvcc"] if home else []
    found += [Path(path) for path in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if path]
    return next((str(path) for path in found if path.is_file()), None)


def torch_cuda(torch: Path) -> bool:
    """Whether this torch is a CUDA build."""
    return re.search(r"^cuda\b.*=\s*['\"]", (torch / "version.py").read_text(), re.MULTILINE) is not None


def digest(command: list[str], inputs: list[Path], torch: Path) -> str:
    """Names what a command makes of its inputs and of torch's headers."""
    parts = [shlex.join(command).encode(), (torch / "version.py").read_bytes(), *(path.read_bytes() for path in inputs)]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:20]


def run(command: list[str]) -> None:
    """Run a command; on failure its output is the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: ling's kernels do not compile\n{shlex.join(command)}\n{done.stdout}{done.stderr}")


class Build:
    """Objects and libraries of one toolchain."""

    def __init__(self, compiler: list[str], torch: Path) -> None:
        self.compiler, self.torch = compiler, torch
        self.version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout

    def cpu(self) -> tuple[list[tuple[Path, list[str]]], list[str]]:
        """Sources with their flags, and flags to link them."""
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        variants = X86_VARIANTS if x86 else {"baseline": []}
        include = [TARGET, "-isystem", str(self.torch / "include")]
        common = [*CXX_FLAGS, *(["-DLING_CPU_X86"] if x86 else []), *include]
        jobs = [(path, common) for path in sorted(SOURCES.glob("cpu*.cpp")) if path.name != "cpu_kernels.cpp"]
        for name, flags in variants.items():
            jobs.append((SOURCES / "cpu_kernels.cpp", [*CXX_FLAGS, *flags, f"-DLING_CPU_NAMESPACE={name}"]))
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,-z,defs"]
        return jobs, ["-shared", f"-L{self.torch / 'lib'}", "-ltorch_cpu", *undefined]

    def cuda(self) -> tuple[list[tuple[Path, list[str]]], list[str]]:
        """The same for nvcc."""
        last = GPU_ARCHITECTURES[-1]
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in GPU_ARCHITECTURES]
        targets.append(f"-gencode=arch=compute_{last},code=compute_{last}")
        common = [
            *("-std=c++20", "-O3", "-DUSE_CUDA", TARGET, "-isystem", str(self.torch / "include"), *targets),
            *("--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"),
        ]
        jobs = [(path, common) for path in sorted(SOURCES.glob("*.cu"))]
        libraries = [f"-L{self.stub()}", f"-L{self.torch / 'lib'}", "-Xlinker=--no-as-needed"]
        return jobs, ["-shared", *libraries, "-ltorch_cpu", "-ltorch_cuda"]

    def stub(self) -> Path:
        """A folder with a libtorch_cuda.so to link with; a torch without CUDA has none."""
        if (self.torch / "lib" / "libtorch_cuda.so").is_file():
            return self.torch / "lib"
        folder = OBJECTS / "stub"
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "stub.cpp"
        source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
        flags = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", str(folder / "libtorch_cuda.so")]
        run([*(find_compiler() or ["c++"]), str(source), *flags])
        return folder

    def make(self, jobs: list[tuple[Path, list[str]]], link: list[str], output: Path) -> None:
        """Compile what changed, several at a time, and link it all."""
        headers = sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cuh"))
        if jobs[0][0].suffix == ".cpp":
            headers = [path for path in headers if path.suffix == ".h"]
        OBJECTS.mkdir(parents=True, exist_ok=True)

        def compile_one(job: tuple[Path, list[str]]) -> str:
            source, flags = job
            command = [*self.compiler, *flags, "-c", str(source)]
            name = f"{source.stem}-{digest([*command, self.version], [source, *headers], self.torch)}.o"
            made = OBJECTS / name
            if not made.is_file():
                print(f"compiling {source.relative_to(ROOT)}", flush=True)
                run([*command, "-o", str(made) + f".{os.getpid()}"])
                os.replace(str(made) + f".{os.getpid()}", made)
            return str(made)

        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:
            objects = list(pool.map(compile_one, jobs))
        output.parent.mkdir(parents=True, exist_ok=True)
        # aside and renamed: a process may have the old one loaded
        run([*self.compiler, *objects, *link, "-o", f"{output}.{os.getpid()}"])
        os.replace(f"{output}.{os.getpid()}", output)
        for stem in {source.stem for source, _ in jobs}:
            for path in OBJECTS.glob(f"{stem}-*.o"):
                if str(path) not in objects:
                    path.unlink(missing_ok=True)


class BuildKernels(build_ext):
    """build_ext whose extensions are plain shared libraries."""

    def get_ext_filename(self, fullname: str) -> str:
        """The file of a library, which carries no mark of a Python version."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Make one library where setuptools wants it."""
        torch, compiler = find_torch(), find_compiler()
        nvcc = find_nvcc()
        assert torch is not None
        if ext.name.endswith("_cuda"):
            assert nvcc is not None
            build = Build([nvcc], torch)
            jobs, link = build.cuda()
        else:
            assert compiler is not None
            build = Build(compiler, torch)
            jobs, link = build.cpu()
        build.make(jobs, link, Path(self.get_ext_fullpath(ext.name)).absolute())


def libraries() -> list[Extension]:
    """What can be built here; a warning for what cannot."""
    torch = find_torch()
    if torch is None:
        warnings.warn(
            "torch >= 2.10 is not installed yet: ling gets no compiled kernels. Install it first", stacklevel=1
        )
        return []
    found = []
    if find_compiler() is None:
        warnings.warn("no C++20 compiler found (set CXX): ling gets no CPU kernels", stacklevel=1)
    else:
        found.append(Extension("ling._C_cpu", sources=[]))
    wanted = os.environ.get("LING_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"error: LING_BUILD_CUDA={wanted}: expected 0 or 1, or nothing")
    if wanted == "1" and find_nvcc() is None:
        sys.exit("error: LING_BUILD_CUDA=1, but there is no nvcc in $CUDA_HOME/bin, the path or /usr/local/cuda/bin")
    has_sources = any(SOURCES.glob("*.cu"))
    if has_sources and (wanted == "1" or (wanted == "" and torch_cuda(torch) and find_nvcc() is not None)):
        found.append(Extension("ling._C_cuda", sources=[]))
    elif wanted == "" and torch_cuda(torch):
        warnings.warn("no nvcc found (set CUDA_HOME): ling gets no CUDA kernels", stacklevel=1)
    return found


setup(ext_modules=libraries(), cmdclass={"build_ext": BuildKernels})
