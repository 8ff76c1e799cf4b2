"""The adaptation of megatron-core to the CPU: what it replaces, when, and what the replaced names then do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ling.config.errors import UserError
from ling.config.schema import ParallelConfig
from ling.parallel import groups
from ling.platform import cpu, get_platform, megatron
from ling.platform.cpu import REPLACED_IN_MEGATRON, REPLACED_IN_TORCH, CpuPlatform, Replacement

ROOT = Path(__file__).parents[2]
EVERYTHING = [*REPLACED_IN_TORCH, *REPLACED_IN_MEGATRON]


def python(program: str, *arguments: str) -> str:
    """What a program prints in a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORTS = """
import functools, importlib, json, sys, torch
def found(path):
    return functools.reduce(getattr, path.split(".")[1:], torch)
names = json.loads(sys.argv[1])
compiled, before = torch.compile, [found(name) for name in names]
for module in ("", ".cli", ".config", ".parallel.groups", ".platform.cpu", ".platform.cuda", ".platform.select"):
    importlib.import_module("ling" + module)
from ling.platform.cuda import CudaPlatform
CudaPlatform()
assert [name for name, old in zip(names, before) if found(name) is not old] == []
assert torch.compile is compiled
assert not [name for name in sys.modules if name.split(".")[0] == "megatron"]
from ling.platform import get_platform
get_platform("cpu")
assert [name for name, old in zip(names, before) if found(name) is not old] == []
get_platform("cpu").start(0)
print(json.dumps([name for name, old in zip(names, before) if found(name) is old]))
assert torch.compile is compiled
"""


def test_only_the_start_of_the_cpu_platform_replaces_anything():
    names = [f"{entry.owner}.{entry.name}" for entry in REPLACED_IN_TORCH]
    assert json.loads(python(IMPORTS, json.dumps(names))) == []


@pytest.mark.ranks(1)
@pytest.mark.parametrize("number", range(len(EVERYTHING)), ids=lambda i: f"{EVERYTHING[i].owner}.{EVERYTHING[i].name}")
def test_every_replaced_name_was_there_and_is_replaced(number):
    entry = EVERYTHING[number]
    original = cpu._originals[(entry.owner, entry.name)]
    now = getattr(cpu._owner(entry.owner), entry.name)
    assert now is not original
    assert now.__wrapped__ is original if entry.wraps else now is entry.value


@pytest.mark.ranks(1)
def test_a_second_start_changes_nothing():
    before = [getattr(cpu._owner(entry.owner), entry.name) for entry in EVERYTHING]
    get_platform("cpu").start(0, num_threads=1)
    assert all(
        getattr(cpu._owner(entry.owner), entry.name) is old for entry, old in zip(EVERYTHING, before, strict=True)
    )


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("torch.cuda", "no_such_name"),
        ("torch.cuda.no_such_module", "empty"),
        ("megatron.core.no_such_module", "function"),
        ("megatron.core.transformer.moe.token_dispatcher", "no_such_name"),
    ],
)
def test_a_name_that_has_moved_is_told_with_the_version(owner, name):
    version = ".".join(map(str, megatron.version()))
    with pytest.raises(UserError) as caught:
        cpu._replace(Replacement(owner, name, None))
    assert str(caught.value) == (
        f"megatron-core {version} is not supported: {owner}.{name} has moved; pip install '{megatron.REQUIREMENT}'"
    )


@pytest.mark.ranks(1)
def test_which_versions_are_supported():
    from megatron.core import package_info

    with pytest.MonkeyPatch.context() as patch:
        for version, supported in (
            ((0, 16, 0), False),
            ((0, 16, 1), True),
            ((0, 19, 9), True),
            ((0, 20, 0), False),
            ((1, 0, 0), False),
        ):
            patch.setattr(package_info, "VERSION", (*version, ""))
            if supported:
                megatron.check_version()
                continue
            with pytest.raises(UserError, match=rf"megatron-core {version[0]}\.{version[1]}\.\d is not supported: "):
                megatron.check_version()


MISSING = """
import sys
sys.modules[sys.argv[1]] = None
from ling.platform import get_platform
from ling.config import UserError
try:
    get_platform("cpu").start(0)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("megatron", f"megatron-core is not installed; pip install '{megatron.REQUIREMENT}'"),
        ("packaging", "megatron-core needs packaging, which is not installed; pip install packaging"),
    ],
)
def test_a_missing_package_is_told_with_the_mend(module, message):
    assert python(MISSING, module).strip() == message


@pytest.mark.ranks(1)
def test_streams_and_events_have_already_happened():
    stream, event = torch.cuda.Stream(priority=1), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        total = torch.ones(3).sum()
        event.record(stream)
    with torch.cuda.stream(None):
        pass
    stream.wait_event(event)
    stream.wait_stream(torch.cuda.current_stream())
    event.wait(stream)
    event.synchronize()
    assert isinstance(stream.record_event(), torch.cuda.Event)
    assert stream.record_event(event) is event
    torch.cuda.default_stream().synchronize()
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() is torch.cuda.current_stream()
    assert torch.cuda.is_current_stream_capturing() is False
    assert total == 3


@pytest.mark.ranks(1)
def test_tensors_are_made_on_the_cpu_and_named_as_on_cuda():
    device = torch.cuda.current_device()
    assert device == torch.device("cpu")
    for tensor in (
        torch.empty(2, device="cuda"),
        torch.zeros(2, device="cuda:1"),
        torch.ones(2, device=torch.device("cuda"), pin_memory=True),
        torch.tensor([1.0, 2.0], device="cuda"),
        torch.empty_like(torch.zeros(2), device="cuda"),
        torch.zeros(2, device=device),
        torch.zeros(2).cuda(),
        torch.cuda.FloatTensor([1.0, 2.0]),
    ):
        assert tensor.device.type == "cpu"
        assert tensor.shape == (2,)
        assert tensor.type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(2).type(torch.int32).dtype == torch.int32
    for kind, dtype in (("Long", torch.int64), ("Int", torch.int32), ("Byte", torch.uint8)):
        assert getattr(torch.cuda, f"{kind}Tensor")([1, 2]).dtype == dtype
        assert not isinstance(torch.zeros(1), getattr(torch.cuda, f"{kind}Tensor"))
    module = torch.nn.Linear(2, 2)
    assert module.cuda() is module


@pytest.mark.ranks(1)
def test_other_devices_are_left_alone():
    assert torch.zeros(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        made = [torch.empty(2), torch.zeros(2), torch.ones(2), torch.tensor([1.0]), torch.nn.Linear(2, 2).weight]
    assert {tensor.device.type for tensor in made} == {"meta"}


@pytest.mark.ranks(1)
def test_random_states_are_the_cpus():
    torch.cuda.manual_seed(3)
    state, first = torch.cuda.get_rng_state(), torch.rand(4)
    assert not torch.equal(torch.rand(4), first)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), first)

    from megatron.core import tensor_parallel

    groups.build_groups(ParallelConfig())
    groups.seed_random_states(5)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        inside = torch.rand(4)
    outside = torch.rand(4)
    groups.seed_random_states(5)
    assert torch.equal(torch.rand(4), outside)  # what was drawn inside did not move the state outside
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(4), inside)


@pytest.mark.ranks(2)
def test_collectives_run():
    assert dist.get_backend() == CpuPlatform.collectives
    groups.build_groups(ParallelConfig(tensor_model_parallel_size=2))
    mine = groups.tensor()
    assert (mine.rank, mine.size) == (dist.get_rank(), 2)
    assert groups.data().size == 1


@pytest.mark.ranks(1)
def test_threads_are_shared_between_the_ranks_of_a_machine():
    cores = len(os.sched_getaffinity(0))
    with pytest.MonkeyPatch.context() as patch:
        try:
            for ranks, wanted, threads in ((1, None, cores), (cores, None, 1), (64 * cores, None, 1), (1, 3, 3)):
                patch.setenv("LOCAL_WORLD_SIZE", str(ranks))
                get_platform("cpu").start(0, wanted)
                assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)


def test_what_the_platform_says_of_the_machine(monkeypatch):
    platform = CpuPlatform()
    assert platform.device == torch.device("cpu")
    assert 0.01 < platform.peak_memory_gib() < 1000
    platform.synchronize()
    lines = {"model name": ["model name\t: A Processor"], "flags": ["flags\t: fpu avx512f"]}
    monkeypatch.setattr(cpu, "_cpuinfo", lambda key: lines[key])
    assert platform.device_name() == "A Processor"
    assert platform.bf16_is_fast() is False
    lines["flags"] = ["flags\t: fpu avx512_bf16 amx_tile"]
    assert platform.bf16_is_fast() is True
    lines.update({"model name": [], "flags": []})
    assert platform.device_name() == "CPU"
    assert platform.bf16_is_fast() is False


def test_the_platform_of_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_platform("auto").name == get_platform("cpu").name == "cpu"
    with pytest.raises(UserError, match="runtime.platform=cuda: torch .* sees no CUDA device; .*runtime.platform=auto"):
        get_platform("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert get_platform("auto").name == get_platform("cuda").name == "cuda"
    assert get_platform("cpu").name == "cpu"
