"""Which implementation is chosen: what the config names or an error, and by itself what is there."""

import pytest
import torch

from ling.config.errors import UserError
from ling.config.schema import PrecisionConfig, RuntimeConfig
from ling.platform import optional
from ling.platform.optional import ABSENT, Found
from ling.platform.select import choose, precision_recipe


@pytest.fixture
def installed(monkeypatch):
    """The optional packages that are there; any other is not installed."""
    names: set[str] = set()

    def find(name: str) -> Found:
        return Found(name, "1.0", torch, None) if name in names else Found(name, None, None, ABSENT)

    monkeypatch.setattr(optional, "find", find)
    return names


def implementations(platform: str = "cpu", **runtime: str) -> dict[str, str]:
    choices = choose(RuntimeConfig(**runtime), platform)
    assert all(choice.operation == name and choice.reason for name, choice in choices.items())
    return {name: choice.implementation for name, choice in choices.items()}


@pytest.mark.usefixtures("installed")
def test_by_itself_without_any_package():
    found = implementations()
    assert (found["attention"], found["optimizer"]) == ("sdpa", "torch")
    assert found["experts"] == ("grouped_mm" if hasattr(torch.nn.functional, "grouped_mm") else "loop")
    assert implementations("cuda") == found | {"activation": implementations("cuda")["activation"]}


def test_what_is_named_is_taken_where_it_can_run(installed):
    installed.update({"flash_attn", "transformer_engine"})
    assert implementations("cuda", attention="flash")["attention"] == "flash"
    assert implementations("cuda", attention="te")["attention"] == "te"
    assert implementations("cuda", attention="sdpa", grouped_gemm="loop")["experts"] == "loop"
    assert implementations("cuda")["attention"] == "sdpa"  # the others are for those who ask


@pytest.mark.parametrize(("name", "package"), [("flash", "flash_attn"), ("te", "transformer_engine")])
def test_attention_that_cannot_run_is_an_error(installed, name, package):
    with pytest.raises(UserError, match=f"runtime.attention={name}: {package}: not installed; set runtime.attention="):
        choose(RuntimeConfig(attention=name), "cuda")
    installed.add(package)
    with pytest.raises(UserError, match=f"runtime.attention={name}: {package}: it needs a CUDA device; "):
        choose(RuntimeConfig(attention=name), "cpu")


@pytest.mark.usefixtures("installed")
def test_experts_without_grouped_mm(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None, raising=False)
    assert implementations(grouped_gemm="grouped_mm")["experts"] == "grouped_mm"
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert implementations()["experts"] == "loop"
    with pytest.raises(UserError, match=r"runtime.grouped_gemm=grouped_mm: torch .* has no grouped_mm; set .*=loop"):
        choose(RuntimeConfig(grouped_gemm="grouped_mm"), "cpu")


def test_the_fused_optimizer_that_is_there(installed):
    installed.add("apex")
    assert implementations()["optimizer"] == "apex"
    installed.add("transformer_engine")
    assert implementations()["optimizer"] == "transformer_engine"


class Machine:
    """A platform of which only one thing is asked."""

    def __init__(self, fast: bool) -> None:
        self.fast = fast

    def bf16_is_fast(self) -> bool:
        return self.fast


@pytest.mark.parametrize(
    ("recipe", "fast", "resolved"),
    [
        ("auto", True, "bf16"),
        ("auto", False, "fp32"),
        ("bf16", False, "bf16"),
        ("fp32", True, "fp32"),
    ],
)
def test_precision(recipe, fast, resolved):
    assert precision_recipe(PrecisionConfig(recipe=recipe), Machine(fast)) == resolved


def test_transformer_engine_where_it_can_run(installed):
    installed.add("transformer_engine")
    found = implementations("cuda")
    assert (found["linear"], found["experts"]) == ("te", "te")
    found = implementations("cuda", backend="torch")
    assert (found["linear"], found["experts"]) == ("torch", "grouped_mm")
    assert implementations("cuda", grouped_gemm="loop")["experts"] == "loop"
    assert implementations("cpu")["linear"] == "torch"
    with pytest.raises(
        UserError, match="runtime.backend=te: transformer_engine: it needs a CUDA device; set runtime.b"
    ):
        choose(RuntimeConfig(backend="te"), "cpu")
    with pytest.raises(UserError, match="runtime.grouped_gemm=te: it goes with Transformer Engine's linear layers"):
        choose(RuntimeConfig(backend="torch", grouped_gemm="te"), "cuda")


@pytest.mark.usefixtures("installed")
def test_fp8_needs_transformer_engine():
    with pytest.raises(
        UserError, match="fp8 needs Transformer Engine's layers .*not installed.*set precision.recipe=bf"
    ):
        choose(RuntimeConfig(), "cuda", "fp8")


@pytest.mark.usefixtures("installed")
def test_kernels(monkeypatch):
    from ling.activations import ops

    monkeypatch.setitem(ops._PROBLEMS, "cuda", None)
    assert implementations("cuda")["activation"] == "fused"
    assert implementations("cuda", kernels="reference")["activation"] == "reference"
    mixed = choose(RuntimeConfig(), "cuda", activations=["powlu", "toy"])["activation"]
    assert mixed.implementation == "fused"
    assert mixed.reason.endswith("readable torch math for toy")
    with pytest.raises(UserError, match="runtime.kernels=fused: toy has no compiled kernel; set runtime.kernels=auto"):
        choose(RuntimeConfig(kernels="fused"), "cuda", activations=["toy"])
    monkeypatch.setitem(ops._PROBLEMS, "cuda", "it was not built")
    assert implementations("cuda")["activation"] == "reference"
    with pytest.raises(UserError, match="runtime.kernels=fused: it was not built; set runtime.kernels=auto"):
        choose(RuntimeConfig(kernels="fused"), "cuda")
