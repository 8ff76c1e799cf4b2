"""FFNActivation: the same numbers as plain autograd, fp32 inside, and nothing kept but its input and router weight."""

import math

import pytest
import torch

from ling.activations.module import FFNActivation
from ling.activations.reference import phi
from ling.activations.table import ACTIVATIONS, resolve
from tests.activations.specs import NAMES, WIDTH, resolved

TOKENS = (3, 5)
LEARNING = sorted(name for name, row in ACTIVATIONS.items() if row.learnable)


def make(name, dtype=torch.float32, tokens=TOKENS):
    generator = torch.Generator().manual_seed(3)
    columns = WIDTH * (2 if ACTIVATIONS[name].gated else 1)
    x = (3 * torch.randn(*tokens, columns, generator=generator)).to(dtype).requires_grad_()
    weight = torch.rand(*tokens, generator=generator).requires_grad_()
    upstream = torch.randn(*tokens, WIDTH, generator=generator).to(dtype)
    return x, weight, upstream


def build(name):
    """The module, with its scalars learned if it has some."""
    return FFNActivation(resolved(name, **({"learn": "per_layer"} if name in LEARNING else {})))


def tensors(activation, x, weight=None):
    """What a result is differentiated by: input, router weight, scalars."""
    return [tensor for tensor in (x, weight, activation.scalars) if tensor is not None]


def plain(name, x, weight=None, scalars=None):
    """The same math by plain autograd, in x's dtype."""
    y = phi(ACTIVATIONS[name], x, resolved(name).for_layer(0), scalars)
    return y if weight is None else y * weight.unsqueeze(-1)


@pytest.mark.parametrize("name", NAMES)
def test_fp32_equals_plain_autograd(name):
    x, weight, upstream = make(name)
    activation = build(name)
    assert activation.name == name
    assert activation.gated == ACTIVATIONS[name].gated
    y, expected = activation(x, weight), plain(name, x, weight, activation.scalars)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
    inputs = tensors(activation, x, weight)
    found = torch.autograd.grad(y, inputs, upstream)
    truth = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_rounded_once(name):
    x, weight, upstream = make(name, torch.bfloat16)
    activation = build(name).bfloat16()
    inputs = tensors(activation, x, weight)
    y = activation(x, weight)
    assert y.dtype == torch.bfloat16
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = plain(name, *exact)
    assert ((y.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-7).all()
    dx, dweight, *dscalars = torch.autograd.grad(y, inputs, upstream)
    exact_dx, exact_dweight, *exact_dscalars = torch.autograd.grad(truth, exact, upstream.double())
    assert [t.dtype for t in (dx, dweight, *dscalars)] == [t.dtype for t in inputs]
    assert ((dx.double() - exact_dx).abs() <= 2**-8 * exact_dx.abs() + 1e-5).all()
    torch.testing.assert_close(dweight.double(), exact_dweight, rtol=1e-5, atol=1e-4)
    for found, exact_one in zip(dscalars, exact_dscalars, strict=True):
        torch.testing.assert_close(found.double(), exact_one, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_in_double(name):
    x, weight, _ = make(name, torch.float64, tokens=(2,))
    weight = weight.detach().double().requires_grad_()
    activation = build(name).double()
    assert torch.autograd.gradcheck(activation, (x, weight))
    assert torch.autograd.gradcheck(activation, (x,))


@pytest.mark.parametrize("name", LEARNING)
def test_scalars_are_a_parameter_with_its_initial_values(name):
    activation = build(name)
    initial = resolved(name).initial_scalars()
    assert [key for key, _ in activation.named_parameters()] == ["scalars"]
    assert activation.scalars.tolist() == pytest.approx(initial)
    assert activation.scalars.shape == (len(initial),)
    assert list(activation.state_dict()) == ["scalars"]
    assert activation.learn == "per_layer"
    with torch.device("meta"):
        assert build(name).scalars.is_meta


@pytest.mark.parametrize("name", LEARNING)
def test_fixed_scalars_stay_as_the_config_has_them(name):
    activation = FFNActivation(resolved(name, learn="fixed")).bfloat16()
    assert list(activation.parameters()) == []
    assert list(activation.state_dict()) == []
    assert activation.scalars.dtype == torch.float32
    assert activation.scalars.tolist() == torch.tensor(resolved(name).initial_scalars()).tolist()
    x, weight, upstream = make(name)
    y = activation(x, weight)
    torch.testing.assert_close(y, plain(name, x, weight, activation.scalars), rtol=1e-6, atol=1e-7)
    assert len(torch.autograd.grad(y, (x, weight), upstream)) == 2


def test_activations_without_scalars_have_no_state():
    activation = FFNActivation(resolve("powlu"))
    assert activation.scalars is None
    assert activation.bfloat16().cpu().scalars is None
    assert list(activation.state_dict()) == []


def test_row_statistics_can_be_replaced():
    class Doubled:
        def mean(self, x):
            return 2 * x.mean(-1, keepdim=True)

    x, weight, upstream = make("polynorm", torch.float64)
    activation = build("polynorm").double()
    activation.rows = Doubled()
    y = activation(x)
    params = resolved("polynorm").for_layer(0)
    torch.testing.assert_close(y, phi(ACTIVATIONS["polynorm"], x, params, activation.scalars, Doubled()))
    assert not torch.allclose(y, plain("polynorm", x, None, activation.scalars))
    assert torch.autograd.gradcheck(activation, (x,))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="no implementation of the activation is called 'fast'"):
        FFNActivation(resolve("powlu"), "fast")


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("name", ["powlu", "topk_relu", "polynorm", "series"])
def test_only_input_weight_and_scalars_are_saved(name, with_weight):
    x, weight, _ = make(name, torch.bfloat16)
    activation = build(name)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        activation(x, weight if with_weight else None)
    expected = tensors(activation, x, weight if with_weight else None)
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
    y = build(name)(x, weight)
    assert y.shape == (0, WIDTH)
    dx, dweight = torch.autograd.grad(y, (x, weight), upstream)
    assert (dx.shape, dweight.shape) == (x.shape, weight.shape)


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_input(name):
    x, weight, upstream = make(name, tokens=(5,))
    activation = build(name)
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
