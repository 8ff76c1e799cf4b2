"""Each reference against a formula written apart in float64, its derivative, and its behaviour at the edges."""

import math

import pytest
import torch

from ling.activations.reference import REFERENCE, gelu, powlu, relu2, swiglu, swiglu_clip
from ling.activations.table import ACTIVATIONS, resolve

TINY = torch.finfo(torch.float32).tiny
EDGES = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    TINY,
    -TINY,
    1e-30,
    -1e-30,
    1e-6,
    -1e-6,
    1.0,
    -1.0,
    50.0,
    -50.0,
    1e4,
    -1e4,
    1e15,
    -1e15,
]


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def powlu_gate(x, m):
    return x ** (m / (math.sqrt(x) + 1)) * sigmoid(x) if x > 0 else x * sigmoid(x)


def powlu_gate_slope(x, m):
    s = sigmoid(x)
    if x <= 0:
        return s * (1 + x * (1 - s))
    r = math.sqrt(x)
    p, dp = m / (r + 1), -m / (2 * r * (r + 1) ** 2)
    return powlu_gate(x, m) * (p / x + dp * math.log(x) + 1 - s)


def clip_gate(g, limit, alpha):
    g = min(g, limit)
    return g * sigmoid(alpha * g)


def clip_gate_slope(g, limit, alpha):
    s = sigmoid(alpha * g)
    return s * (1 + alpha * g * (1 - s)) if g <= limit else 0.0


# name -> (parameters, truth(*inputs), gradients(*inputs)), in Python floats
TRUTH = {
    "powlu": (
        {"m": 3.0},
        lambda g, u: powlu_gate(g, 3.0) * u,
        lambda g, u: (powlu_gate_slope(g, 3.0) * u, powlu_gate(g, 3.0)),
    ),
    "swiglu": (
        {},
        lambda g, u: g * sigmoid(g) * u,
        lambda g, u: (sigmoid(g) * (1 + g * (1 - sigmoid(g))) * u, g * sigmoid(g)),
    ),
    "swiglu_clip": (
        {"limit": 2.0, "alpha": 1.702, "beta": 1.0},
        lambda g, u: clip_gate(g, 2.0, 1.702) * (max(-2.0, min(2.0, u)) + 1.0),
        lambda g, u: (
            clip_gate_slope(g, 2.0, 1.702) * (max(-2.0, min(2.0, u)) + 1.0),
            clip_gate(g, 2.0, 1.702) if abs(u) <= 2.0 else 0.0,
        ),
    ),
    "gelu": (
        {},
        lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
        lambda x: (0.5 * math.erfc(-x / math.sqrt(2)) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi),),
    ),
    "relu2": ({}, lambda x: x * x if x > 0 else 0.0, lambda x: (2 * x if x > 0 else 0.0,)),
}


def inputs_of(name, count=400):
    generator = torch.Generator().manual_seed(7)
    n = 2 if ACTIVATIONS[name].gated else 1
    return [4 * torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(n)]


def test_every_row_of_the_registry_has_a_reference_and_a_truth():
    assert set(REFERENCE) == set(ACTIVATIONS) == set(TRUTH)


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_value_and_derivative_in_float64(name):
    params, truth, slopes = TRUTH[name]
    inputs = [x.requires_grad_() for x in inputs_of(name)]
    y = REFERENCE[name](*inputs, **params)
    grads = torch.autograd.grad(y.sum(), inputs)
    rows = list(zip(*[x.tolist() for x in inputs], strict=True))
    torch.testing.assert_close(
        y, torch.tensor([truth(*row) for row in rows], dtype=torch.float64), rtol=1e-12, atol=1e-14
    )
    expected = torch.tensor([slopes(*row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(grads, dim=1), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", sorted(TRUTH))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_storage_types_are_computed_in_fp32(name, dtype, tolerance):
    params, truth, _ = TRUTH[name]
    inputs = [x.to(dtype) for x in inputs_of(name)]
    y = REFERENCE[name](*inputs, **params)
    assert y.dtype == dtype
    rows = zip(*[x.double().tolist() for x in inputs], strict=True)
    expected = torch.tensor([truth(*row) for row in rows], dtype=torch.float64)
    assert ((y.double() - expected).abs() <= tolerance * expected.abs() + 1e-30).all()


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_gradcheck(name):
    params, _, _ = TRUTH[name]
    inputs = [x[:40].clone() for x in inputs_of(name)]
    for x in inputs:
        # finite differences do not cross kinks: at 0, and at the clip limit 2
        for kink in (-2.0, 0.0, 2.0):
            x[(x - kink).abs() < 1e-3] = kink + 0.01
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: REFERENCE[name](*args, **params), inputs)


@pytest.mark.parametrize("name", sorted(TRUTH))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_nan_at_any_finite_input(name, dtype):
    gated = ACTIVATIONS[name].gated
    edges = torch.tensor(EDGES, dtype=dtype)
    pairs = torch.cartesian_prod(edges, edges) if gated else edges[:, None]
    inputs = [pairs[:, i].clone().requires_grad_() for i in range(pairs.shape[1])]
    specs = [resolve(name)] + ([resolve({"name": name, "m": m}) for m in (0.05, 1.0, 9.9)] if name == "powlu" else [])
    for resolved in specs:
        y = REFERENCE[name](*inputs, **resolved.for_layer(0))
        assert torch.isfinite(y).all()
        for grad in torch.autograd.grad(y.sum(), inputs):
            assert not torch.isnan(grad).any()


def gate(x, m=3.0):
    x = torch.as_tensor(x, dtype=torch.float64)
    return powlu(x, torch.ones_like(x), m=m)


def test_powlu_published_values():
    x = [0.1, 1.0, 2.0, 4.0, 16.0, 100.0, 1e4]
    expected = torch.tensor([0.0028, 0.7311, 2.084, 3.928, 5.278, 3.51, 1.31], dtype=torch.float64)
    digits = torch.tensor([1e-4, 1e-4, 1e-3, 1e-3, 1e-3, 1e-2, 1e-2], dtype=torch.float64)
    assert ((gate(x) - expected).abs() <= 0.51 * digits).all()
    # sqrt(4) + 1 = m: the power is x itself, so f is SiLU
    assert gate(4.0).item() == pytest.approx(4 * sigmoid(4), rel=1e-14)


@pytest.mark.parametrize(("m", "top"), [(2.0, 3.05), (3.0, 5.316), (4.0, 9.28), (9.9, 248.0)])
def test_powlu_peak(m, top):
    x = torch.linspace(0.01, 400, 400_000, dtype=torch.float64)
    f = gate(x, m)
    assert f.max().item() == pytest.approx(top, rel=2e-3)
    if m == 3.0:
        assert x[f.argmax()].item() == pytest.approx(12.9, abs=0.05)


def test_powlu_limits():
    assert gate(1e30).item() == pytest.approx(1.0, abs=1e-9)
    x = torch.linspace(-60, 0, 1001, dtype=torch.float64)
    torch.testing.assert_close(gate(x), torch.nn.functional.silu(x), rtol=1e-12, atol=0)
    # hence PowLU(x, x) ~ x, where SwiGLU(x, x) ~ x^2
    big = torch.tensor(1e12, dtype=torch.float64)
    assert (powlu(big, big, m=3.0) / big).item() == pytest.approx(1.0, abs=1e-3)
    assert (swiglu(big, big) / big**2).item() == pytest.approx(1.0)


def test_powlu_is_continuous_with_a_kink_at_zero():
    step = 1e-7
    for m in (1.5, 2.0, 3.0, 9.0):
        assert abs(gate(step, m).item() - gate(-step, m).item()) < 1e-6
        assert gate(0.0, m).item() == 0.0
        assert ((gate(0.0, m) - gate(-step, m)) / step).item() == pytest.approx(0.5, abs=1e-6)
        assert ((gate(step, m) - gate(0.0, m)) / step).item() == pytest.approx(0.0, abs=1e-3)
    # from the right: infinite for m < 1
    slopes = [(gate(h, 0.5) / h).item() for h in (1e-4, 1e-8, 1e-12)]
    assert slopes[0] < slopes[1] < slopes[2]
    assert slopes[2] > 1e4


def test_powlu_one_input_form_is_monotone_and_smooth_at_zero():
    x = torch.logspace(-4, 6, 20_000, dtype=torch.float64)
    for m in (0.1, 1.0, 3.0, 9.99):
        assert (torch.diff(powlu(x, x, m=m)) > 0).all()
    h = torch.tensor(1e-6, dtype=torch.float64)
    assert (powlu(h, h, m=3.0) / h).item() == pytest.approx(0.0, abs=1e-5)
    assert (powlu(-h, -h, m=3.0) / -h).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("limit", [1.0, 7.0])
def test_swiglu_clip_on_both_sides_of_the_limits(limit):
    below, above = math.nextafter(limit, 0), math.nextafter(limit, math.inf)
    g = torch.tensor([below, limit, above, -above, -100.0], dtype=torch.float64, requires_grad=True)
    u = torch.full_like(g, 0.5).requires_grad_()
    y = swiglu_clip(g, u, limit=limit, alpha=1.0, beta=0.0)
    dg, _ = torch.autograd.grad(y.sum(), (g, u))
    # the gate is clipped above only
    assert (dg != 0).tolist() == [True, True, False, True, True]
    torch.testing.assert_close(y[2], y[1], rtol=0, atol=0)
    g = torch.full((5,), 0.5, dtype=torch.float64)
    u = torch.tensor([below, limit, above, -limit, -above], dtype=torch.float64, requires_grad=True)
    (du,) = torch.autograd.grad(swiglu_clip(g, u, limit=limit, alpha=1.0, beta=0.0).sum(), u)
    assert (du != 0).tolist() == [True, True, False, True, False]


def test_swiglu_clip_without_limit_is_swiglu():
    g, u = inputs_of("swiglu_clip")
    torch.testing.assert_close(swiglu_clip(g, u, limit=math.inf, alpha=1.0, beta=0.0), swiglu(g, u), rtol=0, atol=0)


def test_ungated_against_torch():
    (x,) = inputs_of("gelu")
    torch.testing.assert_close(gelu(x), torch.nn.functional.gelu(x), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(relu2(x), torch.relu(x) ** 2, rtol=0, atol=0)
