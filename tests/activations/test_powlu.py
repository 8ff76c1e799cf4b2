"""PowLU's published values and properties, and the two clips of SwiGLU beside each other."""

import math

import pytest
import torch

from ling.activations.gated import powlu, situ_glu, swiglu, swiglu_clip, swiglu_clip_post


def gate(x, m=3.0):
    x = torch.as_tensor(x, dtype=torch.float64)
    return powlu(x, torch.ones_like(x), m=m)


def slope(x, m=3.0):
    x = torch.as_tensor(x, dtype=torch.float64).requires_grad_()
    return torch.autograd.grad(powlu(x, torch.ones_like(x), m=m).sum(), x)[0]


def silu(x):
    return x / (1 + math.exp(-x))


def test_published_values():
    x = [0.1, 1.0, 2.0, 4.0, 16.0, 100.0, 1e4]
    expected = torch.tensor([0.0028, 0.7311, 2.084, 3.928, 5.278, 3.51, 1.31], dtype=torch.float64)
    digits = torch.tensor([1e-4, 1e-4, 1e-3, 1e-3, 1e-3, 1e-2, 1e-2], dtype=torch.float64)
    assert ((gate(x) - expected).abs() <= 0.51 * digits).all()
    # sqrt(4) + 1 = m: the power is x itself, so f is SiLU
    assert gate(4.0).item() == pytest.approx(silu(4.0), rel=1e-14)


@pytest.mark.parametrize(("m", "top"), [(2.0, 3.05), (3.0, 5.316), (4.0, 9.28), (9.9, 248.0)])
def test_peak(m, top):
    x = torch.linspace(0.01, 400, 400_000, dtype=torch.float64)
    f = gate(x, m)
    assert f.max().item() == pytest.approx(top, rel=2e-3)
    if m == 3.0:
        assert x[f.argmax()].item() == pytest.approx(12.9, abs=0.05)
        assert (torch.diff(f) < 0).any(), "not monotone"


def test_limits():
    assert gate(1e30).item() == pytest.approx(1.0, abs=1e-9)
    assert gate(math.inf).item() == 1.0
    x = torch.linspace(-60, 0, 1001, dtype=torch.float64)
    torch.testing.assert_close(gate(x), torch.nn.functional.silu(x), rtol=1e-12, atol=0)
    # hence PowLU(x, x) ~ x, where SwiGLU(x, x) ~ x^2
    big = torch.tensor(1e12, dtype=torch.float64)
    assert (powlu(big, big, m=3.0) / big).item() == pytest.approx(1.0, abs=1e-3)
    assert (swiglu(big, big) / big**2).item() == pytest.approx(1.0)


def test_continuous_with_a_kink_at_zero():
    step = 1e-7
    for m in (1.5, 2.0, 3.0, 9.0):
        assert abs(gate(step, m).item() - gate(-step, m).item()) < 1e-6
        assert gate(0.0, m).item() == 0.0
        assert slope(-1e-12, m).item() == pytest.approx(0.5)
        assert slope(0.0, m).item() == 0.5
        assert slope(1e-12, m).item() == pytest.approx(0.0, abs=1e-5)
    slopes = [slope(x, 0.5).item() for x in (1e-4, 1e-8, 1e-12)]
    assert slopes[0] < slopes[1] < slopes[2]
    assert slopes[2] > 1e4


def test_one_input_form_is_monotone_and_smooth_at_zero():
    x = torch.logspace(-4, 6, 20_000, dtype=torch.float64)
    for m in (0.1, 1.0, 3.0, 9.99):
        assert (torch.diff(powlu(x, x, m=m)) > 0).all()
    assert (torch.diff(powlu(x, x, m=10.5)) < 0).any()
    h = torch.tensor(1e-6, dtype=torch.float64)
    assert (powlu(h, h, m=3.0) / h).item() == pytest.approx(0.0, abs=1e-5)
    assert (powlu(-h, -h, m=3.0) / -h).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [0.05, 1.0, 3.0, 9.9])
def test_denormal_gates(dtype, m):
    x = torch.tensor([1e-45, 1e-42, 1e-39, 1.2e-38, 1e-30], dtype=dtype).requires_grad_()
    y = powlu(x, torch.ones_like(x), m=m)
    # one digit is all that a denormal has; the power itself may be one
    expected = torch.tensor([0.5 * v ** (m / (math.sqrt(v) + 1)) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=2e-45)
    assert not torch.isnan(torch.autograd.grad(y.sum(), x)[0]).any()


@pytest.mark.parametrize("limit", [1.0, 7.0])
def test_swiglu_clip_on_both_sides_of_the_limits(limit):
    below, above = math.nextafter(limit, 0), math.nextafter(limit, math.inf)
    g = torch.tensor([below, limit, above, -above, -100.0], dtype=torch.float64, requires_grad=True)
    u = torch.full_like(g, 0.5).requires_grad_()
    y = swiglu_clip(g, u, limit=limit, alpha=1.0, beta=0.0)
    (dg,) = torch.autograd.grad(y.sum(), g)
    # the gate is clipped above only
    assert (dg != 0).tolist() == [True, True, False, True, True]
    torch.testing.assert_close(y[2], y[1], rtol=0, atol=0)
    u = torch.tensor([below, limit, above, -limit, -above], dtype=torch.float64, requires_grad=True)
    half = torch.full_like(u, 0.5)
    for y in (swiglu_clip(half, u, limit=limit, alpha=1.0, beta=0.0), swiglu_clip_post(half, u, limit=limit)):
        (du,) = torch.autograd.grad(y.sum(), u)
        assert (du != 0).tolist() == [True, True, False, True, False]


def test_the_two_clips_differ_where_silu_is_below_the_limit_and_the_gate_above():
    limit = 2.0
    edge = 2.2177  # SiLU(edge) is just below the limit
    g = torch.tensor([1.9, 2.1, edge, 2.3, 50.0], dtype=torch.float64, requires_grad=True)
    u = torch.ones_like(g)
    before = swiglu_clip(g, u, limit=limit, alpha=1.0, beta=0.0)
    after = swiglu_clip_post(g, u, limit=limit)
    assert (before == after).tolist() == [True, False, False, False, False]
    assert after.tolist()[3:] == [limit, limit]
    assert before[4].item() == pytest.approx(silu(limit))
    (slopes,) = torch.autograd.grad(after.sum(), g)
    assert (slopes != 0).tolist() == [True, True, True, False, False]


def test_without_a_limit_the_clips_are_swiglu():
    g, u = 9 * torch.randn(2, 500, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = swiglu(g, u)
    torch.testing.assert_close(swiglu_clip(g, u, limit=math.inf, alpha=1.0, beta=0.0), expected, rtol=0, atol=0)
    torch.testing.assert_close(swiglu_clip_post(g, u, limit=math.inf), expected, rtol=0, atol=0)


def test_situ_is_bounded():
    x = torch.tensor([-1e30, -50.0, 0.0, 50.0, 1e30], dtype=torch.float64)
    y = situ_glu(x[:, None], x[None, :], beta1=4.0, beta2=25.0)
    assert y.abs().max().item() == 100.0
    assert torch.isfinite(y).all()
