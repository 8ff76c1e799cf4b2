"""FFNActivation: the same numbers as plain autograd, fp32 inside, and nothing kept but its input and router weight."""

import math

import pytest
import torch

from ling.activations.module import FFNActivation
from ling.activations.reference import REFERENCE
from ling.activations.table import ACTIVATIONS, resolve

NAMES = sorted(ACTIVATIONS)
TOKENS, WIDTH = (3, 5), 24


def make(name, dtype=torch.float32, tokens=TOKENS):
    generator = torch.Generator().manual_seed(3)
    columns = WIDTH * (2 if ACTIVATIONS[name].gated else 1)
    x = (3 * torch.randn(*tokens, columns, generator=generator)).to(dtype).requires_grad_()
    weight = torch.rand(*tokens, generator=generator).requires_grad_()
    upstream = torch.randn(*tokens, WIDTH, generator=generator).to(dtype)
    return x, weight, upstream


def plain(name, x, weight=None):
    """The same math by plain autograd, in x's dtype."""
    y = REFERENCE[name](*(x.chunk(2, -1) if ACTIVATIONS[name].gated else (x,)), **resolve(name).for_layer(0))
    return y if weight is None else y * weight.unsqueeze(-1)


@pytest.mark.parametrize("name", NAMES)
def test_fp32_equals_plain_autograd(name):
    x, weight, upstream = make(name)
    activation = FFNActivation(resolve(name))
    assert activation.name == name
    assert activation.gated == ACTIVATIONS[name].gated
    y, expected = activation(x, weight), plain(name, x, weight)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
    found = torch.autograd.grad(y, (x, weight), upstream)
    truth = torch.autograd.grad(expected, (x, weight), upstream)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_rounded_once(name):
    x, weight, upstream = make(name, torch.bfloat16)
    y = FFNActivation(resolve(name))(x, weight)
    assert y.dtype == torch.bfloat16
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    truth = plain(name, exact_x, exact_weight)
    assert ((y.double() - truth).abs() <= 2**-8 * truth.abs()).all()
    dx, dweight = torch.autograd.grad(y, (x, weight), upstream)
    exact_dx, exact_dweight = torch.autograd.grad(truth, (exact_x, exact_weight), upstream.double())
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    assert ((dx.double() - exact_dx).abs() <= 2**-8 * exact_dx.abs() + 1e-6).all()
    torch.testing.assert_close(dweight.double(), exact_dweight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_in_double(name):
    x, weight, _ = make(name, torch.float64, tokens=(2,))
    weight = weight.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(FFNActivation(resolve(name)), (x, weight))
    assert torch.autograd.gradcheck(FFNActivation(resolve(name)), (x,))


@pytest.mark.parametrize("with_weight", [False, True])
def test_only_input_and_weight_are_saved(with_weight):
    x, weight, _ = make("powlu", torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        FFNActivation(resolve("powlu"))(x, weight if with_weight else None)
    expected = [x, weight] if with_weight else [x]
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in expected]
    assert [t.dtype for t in saved] == [t.dtype for t in expected]


def test_the_router_weight_scales_each_token():
    x, weight, _ = make("powlu")
    activation = FFNActivation(resolve("powlu"))
    torch.testing.assert_close(activation(x, weight), activation(x) * weight[..., None])
    assert activation(x, torch.zeros(TOKENS)).abs().max() == 0
    (dweight,) = torch.autograd.grad(activation(x, weight).sum(), weight)
    torch.testing.assert_close(dweight, activation(x).sum(-1))
    for wrong in (weight[0], weight[..., None], weight.T):
        with pytest.raises(ValueError, match="router weight of shape"):
            activation(x, wrong)


def test_gradients_only_where_they_are_wanted():
    x, weight, upstream = make("powlu")
    activation = FFNActivation(resolve("powlu"))
    dx, dweight = torch.autograd.grad(activation(x, weight), (x, weight), upstream)
    torch.testing.assert_close(torch.autograd.grad(activation(x, weight.detach()), x, upstream)[0], dx, rtol=0, atol=0)
    (only,) = torch.autograd.grad(activation(x.detach(), weight), weight, upstream)
    torch.testing.assert_close(only, dweight, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(name):
    x, weight, upstream = make(name, torch.bfloat16, tokens=(0,))
    y = FFNActivation(resolve(name))(x, weight)
    assert y.shape == (0, WIDTH)
    dx, dweight = torch.autograd.grad(y, (x, weight), upstream)
    assert (dx.shape, dweight.shape) == (x.shape, weight.shape)


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_input(name):
    x, weight, upstream = make(name, tokens=(5,))
    activation = FFNActivation(resolve(name))
    strided = x.detach().t().contiguous().t().requires_grad_()
    strided_weight = weight.detach().repeat_interleave(2)[::2].requires_grad_()
    assert not strided.is_contiguous()
    expected, y = activation(x, weight), activation(strided, strided_weight)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, (strided, strided_weight), upstream),
        torch.autograd.grad(expected, (x, weight), upstream),
    )


def test_layers_with_their_own_limits():
    activation = FFNActivation(resolve({"name": "swiglu_clip", "limit": [1.0, None]}, num_layers=2))
    x = torch.tensor([[5.0, 5.0]])
    with pytest.raises(RuntimeError, match="set_layer"):
        activation(x)
    activation.set_layer(0)
    assert activation(x).item() == pytest.approx(1 / (1 + math.exp(-1)))
    activation.set_layer(1)
    assert activation(x).item() == pytest.approx(25 / (1 + math.exp(-5)))
    assert "limit=inf" in repr(activation)
