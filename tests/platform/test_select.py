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
    assert implementations("cuda") == found


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
