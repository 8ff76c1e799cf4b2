"""An activation from outside the package: the document's example, from the file to a trained model."""

import re
from pathlib import Path

import pytest
import torch

from ling.activations.module import FFNActivation
from ling.activations.table import ACTIVATIONS, resolve
from ling.config import load_config
from ling.config.plugins import load_plugins
from ling.observe.metrics import read_metrics
from tests.e2e.cli import ling

DOCUMENT = (Path(__file__).parents[2] / "docs" / "adding-an-activation.md").read_text()
DENSE = [
    f"model.{key}=null" for key in ("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
]


@pytest.fixture(scope="module")
def example(place) -> Path:
    """The document's plugin, and its config on top of the tiny run: the path of the first, in `place`."""
    for language in ("python", "yaml"):
        ((text, name),) = re.findall(rf"^```{language}\n(# (\w+\.\w+)\n.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
        (place / name).write_text(text)
    (place / "with_plugin.yaml").write_text("base: [run.yaml, squareplus.yaml]")
    return place / "squareplus_glu.py"


def test_its_gradients_are_right(example, monkeypatch):
    monkeypatch.setattr("ling.activations.table.ACTIVATIONS", dict(ACTIVATIONS))
    load_plugins([str(example)])
    activation = FFNActivation(resolve({"name": "squareplus_glu", "b": 2.0, "leak": 0.1}))
    generator = torch.Generator().manual_seed(0)
    x, weight = 2 * torch.randn(50, 16, generator=generator), torch.rand(50, generator=generator)
    inputs = [x.requires_grad_(), weight.requires_grad_(), activation.scalars]
    found = torch.autograd.grad(activation(x, weight).sum(), inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    gate, up = exact[0].chunk(2, -1)
    smooth = gate / 2 + torch.sqrt(gate**2 / 4 + 0.5) + exact[2] * gate
    truth = torch.autograd.grad((smooth * up * exact[1][:, None]).sum(), exact)
    for ours, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_it_trains_and_its_checkpoint_can_be_evaluated(example, place):
    done = ling("train", "with_plugin.yaml", "run.dir=plugin", *DENSE, "train.eval_interval=0", cwd=place)
    assert done.code == 0, done.err
    losses = [record["loss"] for record in read_metrics(place / "plugin") if "eval" not in record]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5
    assert load_config(place / "plugin" / "config.yaml").run.plugins == [example.name]
    done = ling("eval", "plugin", "--data", "valid", cwd=place)
    assert done.code == 0, done.err


def test_it_is_shown(example, place):
    done = ling("activations", "squareplus_glu", "--plugin", example.name, cwd=place)
    assert done.code == 0
    assert "squareplus_glu: ((g + sqrt" in done.out
    assert "def squareplus_glu(g, u, *, b, scalars):" in done.out
