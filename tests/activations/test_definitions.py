"""Each element-wise definition against a formula and a derivative written apart, in Python floats."""

import math
from dataclasses import replace

import pytest
import torch

from ling.activations.reference import phi
from ling.activations.table import ACTIVATIONS
from tests.activations.specs import NAMES, resolved

SCALE, ALPHA = 1.0507009873554805, 1.6732632423543772


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def silu(x, a=1.0):
    return x * sigmoid(a * x)


def silu_slope(x, a=1.0):
    s = sigmoid(a * x)
    return s * (1 + a * x * (1 - s))


def powlu_gate(x, m):
    return x ** (m / (math.sqrt(x) + 1)) * sigmoid(x) if x > 0 else silu(x)


def powlu_slope(x, m):
    if x <= 0:
        return silu_slope(x)
    r = math.sqrt(x)
    p, dp = m / (r + 1), -m / (2 * r * (r + 1) ** 2)
    return powlu_gate(x, m) * (p / x + dp * math.log(x) + 1 - sigmoid(x))


def normal(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def gelu_slope(x):
    return normal(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def gelu_tanh(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_tanh_slope(x):
    t = math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def tanh_slope(x):
    return 1 - math.tanh(x) ** 2


def clip(x, limit):
    return max(-limit, min(limit, x))


def situ(x, bound=4.0):
    return bound * math.tanh(x / bound) * sigmoid(x)


def situ_slope(x, bound=4.0):
    t, s = math.tanh(x / bound), sigmoid(x)
    return (1 - t * t) * s + bound * t * s * (1 - s)


def gated(gate, slope):
    """Value and slopes of gate(g) * u."""
    return lambda g, u: gate(g) * u, lambda g, u: (slope(g) * u, gate(g))


def ungated(value, slope):
    return value, lambda x: (slope(x),)


def branches(positive, negative):
    return lambda x: positive(x) if x > 0 else negative(x)


# name -> (settings, (value(*inputs), slopes(*inputs)))
TRUTH = {
    "powlu": ({"m": 3.0}, gated(lambda g: powlu_gate(g, 3.0), lambda g: powlu_slope(g, 3.0))),
    "swiglu": ({}, gated(silu, silu_slope)),
    "geglu": ({}, gated(lambda g: g * normal(g), gelu_slope)),
    "geglu_tanh": ({}, gated(gelu_tanh, gelu_tanh_slope)),
    "quick_geglu": ({}, gated(lambda g: silu(g, 1.702), lambda g: silu_slope(g, 1.702))),
    "reglu": ({}, gated(lambda g: max(g, 0.0), lambda g: float(g > 0))),
    "fatreglu": ({"t": 0.5}, gated(lambda g: g if g >= 0.5 else 0.0, lambda g: float(g >= 0.5))),
    "swiglu_clip": (
        {"limit": 2.0, "alpha": 1.702, "beta": 1.0},
        (
            lambda g, u: silu(min(g, 2.0), 1.702) * (clip(u, 2.0) + 1.0),
            lambda g, u: (
                (silu_slope(g, 1.702) if g <= 2.0 else 0.0) * (clip(u, 2.0) + 1.0),
                silu(min(g, 2.0), 1.702) if abs(u) <= 2.0 else 0.0,
            ),
        ),
    ),
    "swiglu_clip_post": (
        {"limit": 2.0},
        (
            lambda g, u: min(silu(g), 2.0) * clip(u, 2.0),
            lambda g, u: (
                (silu_slope(g) if silu(g) <= 2.0 else 0.0) * clip(u, 2.0),
                min(silu(g), 2.0) if abs(u) <= 2.0 else 0.0,
            ),
        ),
    ),
    "situ_glu": (
        {"beta1": 4.0, "beta2": 25.0},
        (
            lambda g, u: situ(g) * 25.0 * math.tanh(u / 25.0),
            lambda g, u: (situ_slope(g) * 25.0 * math.tanh(u / 25.0), situ(g) * tanh_slope(u / 25.0)),
        ),
    ),
    "relu": ({}, ungated(lambda x: max(x, 0.0), lambda x: float(x > 0))),
    "relu2": ({}, ungated(lambda x: max(x, 0.0) ** 2, lambda x: 2 * max(x, 0.0))),
    "gelu": ({}, ungated(lambda x: x * normal(x), gelu_slope)),
    "silu": ({}, ungated(silu, silu_slope)),
    "elu": ({}, ungated(branches(lambda x: x, math.expm1), branches(lambda x: 1.0, math.exp))),
    "selu": (
        {},
        ungated(
            branches(lambda x: SCALE * x, lambda x: SCALE * ALPHA * math.expm1(x)),
            branches(lambda x: SCALE, lambda x: SCALE * ALPHA * math.exp(x)),
        ),
    ),
    "leaky_relu": ({"s": 0.2}, ungated(lambda x: x if x > 0 else 0.2 * x, lambda x: 1.0 if x > 0 else 0.2)),
    "polyrelu": (
        {"a3": 0.5, "a2": -0.3, "a1": 0.7, "a0": 0.1},
        ungated(
            branches(lambda x: 0.5 * x**3 - 0.3 * x**2 + 0.7 * x + 0.1, lambda x: 0.1),
            branches(lambda x: 1.5 * x**2 - 0.6 * x + 0.7, lambda x: 0.0),
        ),
    ),
    "crrelu": (
        {"epsilon": 0.3},
        ungated(
            lambda x: max(x, 0.0) + 0.3 * x * math.exp(-x * x / 2),
            lambda x: float(x > 0) + 0.3 * (1 - x * x) * math.exp(-x * x / 2),
        ),
    ),
    "series": (
        {"n": 3, "rho": "silu", "a": [1.0, -0.5, 2.0], "b": [0.0, 0.3, -1.0]},
        ungated(
            lambda x: silu(x) + silu(-0.5 * x + 0.3) + silu(2 * x - 1),
            lambda x: silu_slope(x) - 0.5 * silu_slope(-0.5 * x + 0.3) + 2 * silu_slope(2 * x - 1),
        ),
    ),
}


def columns_of(name, count=400):
    generator = torch.Generator().manual_seed(7)
    n = 2 if ACTIVATIONS[name].gated else 1
    return 4 * torch.randn(count, n, generator=generator, dtype=torch.float64)


def evaluate(name, settings, x):
    """phi with scalars in x's dtype that want a gradient, and these scalars."""
    found = resolved(name, **settings)
    scalars = torch.tensor(found.initial_scalars(), dtype=x.dtype, requires_grad=True) if found.initial else None
    return phi(found.activation, x, found.for_layer(0), scalars), scalars


def test_every_elementwise_row_has_a_truth():
    assert set(TRUTH) == {name for name, row in ACTIVATIONS.items() if not row.rowwise}


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_value_and_derivative(name):
    settings, (value, slopes) = TRUTH[name]
    x = columns_of(name).requires_grad_()
    y, _ = evaluate(name, settings, x)
    rows = x.tolist()
    expected = torch.tensor([[value(*row)] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(
        grad, torch.tensor([slopes(*row) for row in rows], dtype=torch.float64), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("rho", ["gelu", "relu", "silu", "tanh"])
def test_the_terms_of_a_series(rho):
    terms = {"gelu": lambda x: x * normal(x), "relu": lambda x: max(x, 0.0), "silu": silu, "tanh": math.tanh}
    x = columns_of("series")
    settings = {"rho": rho, "a": [0.7, -1.5], "b": [0.2, -0.4]}
    y, _ = evaluate("series", settings, x)
    expected = [[terms[rho](0.7 * v + 0.2) + terms[rho](-1.5 * v - 0.4)] for (v,) in x.tolist()]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    # as it starts, a series is its first term
    start, _ = evaluate("series", {"n": 4, "rho": rho}, x)
    first = torch.tensor([[terms[rho](v)] for (v,) in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(start, first, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    """Inputs and scalars, at points away from the kinks at 0 and the limits, row-wise ones too."""
    settings = TRUTH[name][0] if name in TRUTH else {}
    found = resolved(name, **settings)
    x = columns_of(name, 30).reshape(1, -1) if found.activation.rowwise else columns_of(name, 30)
    for kink in (-2.0, 0.0, 0.5, 2.0, 2.3):
        x[(x - kink).abs() < 1e-2] = kink + 0.03
    scalars = torch.tensor(found.initial_scalars(), dtype=torch.float64)
    inputs = [x.requires_grad_(), scalars.requires_grad_()] if found.initial else [x.requires_grad_()]
    params = found.for_layer(0)
    assert torch.autograd.gradcheck(lambda x, s=None: phi(found.activation, x, params, s), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_function_stands_alone(name):
    row = ACTIVATIONS[name]
    space = {}
    exec("from __future__ import annotations\n" + row.math_source(), space)  # no import, no global of the module
    found = resolved(name)
    x = columns_of(name, 24).T.reshape(1, -1)
    scalars = torch.tensor(found.initial_scalars(), dtype=torch.float64)
    copied = replace(row, math=space[row.math.__name__])
    expected = phi(row, x, found.for_layer(0), scalars)
    torch.testing.assert_close(phi(copied, x, found.for_layer(0), scalars), expected, rtol=0, atol=0)
    assert "import" not in row.math_source()


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_neither_widens_nor_rounds(name):
    x = columns_of(name, 24).T.reshape(1, -1)
    for dtype in (torch.float32, torch.float64):
        scalars = torch.tensor(resolved(name).initial_scalars(), dtype=dtype)
        y = phi(ACTIVATIONS[name], x.to(dtype), resolved(name).for_layer(0), scalars)
        assert y.dtype == dtype
        assert y.shape == (1, 24)
