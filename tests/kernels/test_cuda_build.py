"""The CUDA kernels compile for every architecture, without spills, with 16-byte memory instructions; without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kernels.harness import CSRC, ROOT, build_rules

ARCHITECTURES = build_rules()["GPU_ARCHITECTURES"]
SOURCES = sorted(path.name for path in CSRC.glob("*.cu") if path.name != "binding.cu")
# what runs most
QUICK = {"elementwise_forward_bf16.cu", "elementwise_backward_bf16.cu", "rowwise.cu"}
# special functions per element of a PowLU on bf16 and fp16, at which H200's unit keeps ahead of its memory
POWLU_BUDGET = 5


@pytest.fixture(scope="module")
def sass():
    """kernels/bench/sass.py; skips without the tools."""
    spec = importlib.util.spec_from_file_location("sass", ROOT / "kernels" / "bench" / "sass.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for tool in ("nvcc", "cuobjdump"):
        if module.find_tool(tool) is None:
            pytest.skip(f"no {tool}")
    return module


@pytest.fixture(scope="module")
def compiled(sass, request, tmp_path_factory):
    """Source and architecture -> a future of its kernels, compiled as the build does; on all cores at once."""
    folder = tmp_path_factory.mktemp("cubins")
    rules, nvcc = build_rules(), sass.find_tool("nvcc")
    _, flags = rules["Build"]([nvcc], rules["find_torch"]()).cuda()[0][0]
    flags = [flag for flag in flags if not flag.startswith("-gencode")]

    def compile_for(source, arch):
        cubin = folder / f"{source}_{arch}.cubin"
        log = sass.compile_kernels(nvcc, flags, CSRC / source, arch, cubin)
        return sass.read_kernels(sass.find_tool("cuobjdump"), cubin, log)

    wanted = [
        (item.callspec.params["source"], item.callspec.params["arch"])
        for item in request.session.items
        if getattr(item, "originalname", None) == "test_machine_code"
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {each: pool.submit(compile_for, *each) for each in wanted}
        pool.shutdown(cancel_futures=True)


def cases():
    for source in SOURCES:
        for arch in ARCHITECTURES:
            yield pytest.param(source, arch, marks=() if source in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("source", "arch"), cases())
def test_machine_code(sass, compiled, source, arch):
    kernels = compiled[source, arch].result()
    assert kernels
    for kernel in kernels:
        assert kernel.spills == 0, f"{kernel.name} spills {kernel.spills} bytes"
        assert kernel.count(r"(LDL|STL)(\.|$)") == 0, f"{kernel.name} keeps registers in memory"
        if source.startswith("elementwise"):
            check_elementwise(kernel, sass.functor_aliases())
        if source.startswith("fp8"):
            # rows, and the columns of one word: stored sixteen bytes at a time
            assert kernel.count(r"STG.*\.128") >= (2 if "F32" in kernel.name else 3), kernel
            assert kernel.count(r"STS\.128") >= 1, kernel
            assert kernel.count(r"LDG.*\.128") >= 1, kernel
        if "topk_kernel" in kernel.name or re.match("polynorm_(backward_)?kernel", kernel.name):
            assert kernel.count(r"STG.*\.128") >= 1, kernel
        if "<PowLU, " in kernel.name and "F32" not in kernel.name and source.startswith("elementwise"):
            # one reciprocal more is of a division of integers
            assert kernel.count("MUFU") <= POWLU_BUDGET * kernel.elements + 1, kernel


def check_elementwise(kernel, functors):
    backward = kernel.name.startswith("backward")
    gated = functors.get(re.search(r"<(\w+), ", kernel.name)[1], "").startswith("Gated<")
    assert kernel.count(r"LDG.*\.128") >= 1 + gated + backward, kernel
    assert kernel.count(r"STG.*\.128") >= 1 + (gated and backward), kernel
    if "F32" not in kernel.name:
        # 32-bit stores would be a vector that came apart; one is for an fp32 gradient of the router weight, one for
        # the partial sums of learned scalars
        assert kernel.count(r"STG\.E$") <= (2 if "scalars" in kernel.name else int(backward)), kernel


@pytest.mark.slow
def test_the_library_links_with_torchs_stable_interface_alone(sass, tmp_path):
    """Undefined symbols are those of the C and C++ libraries and of torch's C shims."""
    rules = build_rules()
    build = rules["Build"]([sass.find_tool("nvcc")], rules["find_torch"]())
    library = tmp_path / "_C_cuda.so"
    build.make(*build.cuda(), library)
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in listed.splitlines()]
    system = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_.*|_ITM_.*|__gmon_start__|__cxa_finalize")
    torch_shims = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+$")
    unexpected = [name for name in symbols if not system.match(name) and not torch_shims.match(name)]
    assert not unexpected
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert "torch_library_impl" in symbols
