"""The GPU's approximate math, computed on the host with special functions as wrong as their documentation allows.

What the special-function unit really does is proved only by tests/gpu; that the errors it may make add up to no more
than a fraction of a unit of bf16 and fp16, in no band down to denormals, is proved here.
"""

import ctypes

import pytest
import torch

from ling.activations import ACTIVATIONS, resolve
from ling.activations.reference import phi
from tests.kernels.harness import host_harness, pointer

# half a unit is between 2^-9 and 2^-8 of a bf16, between 2^-12 and 2^-11 of an fp16
BOUND = 2**-14
# tanh.approx is within 2^-11; SiTU has two
TANH_BOUNDS = {"situ_glu": 2**-9.9, "series_tanh": 2**-10.9}
# beyond, fp32 has infinity
LARGE = 1e38
SPECS = [{"name": name} for name, row in sorted(ACTIVATIONS.items()) if not row.rowwise]
SPECS += [{"name": "powlu", "m": m} for m in (0.5, 1.0, 9.9)]
SPECS += [{"name": "series", "rho": rho} for rho in ("relu", "silu", "tanh")]
MODES = {"large": 0, "small": 1, "by turns": 2}


def gates():
    """fp32 numbers of either sign: every magnitude down to denormals, and the range of activations densely."""
    magnitudes = torch.cat([torch.logspace(-44.8, 36.0, 3000, dtype=torch.float64), torch.linspace(0, 120, 3000)])
    return torch.cat([magnitudes, -magnitudes]).float()


def fast(resolved, functor, mode, g, u, dy):
    """phi forward, phi backward, dg, du by FastMath over worst-case special functions."""
    params = torch.tensor([*resolved.kernel_params(0), 0.0])
    initial = resolved.initial_scalars()
    scalars = torch.tensor([*initial, 0.0])
    results = [torch.full_like(g, float("nan")) for _ in range(4)]
    arguments = [pointer(params), pointer(scalars), len(initial), ctypes.c_int64(g.numel())]
    failed = host_harness().fast_math(
        functor.encode(), mode, *arguments, *(pointer(tensor) for tensor in (g, u, dy, *results))
    )
    assert not failed
    return results


def truth(resolved, g, u, dy):
    """y, dg, du in float64 (du None where the activation is not gated)."""
    g, u = g.double().requires_grad_(), u.double().requires_grad_()
    x = torch.stack([g, u], -1) if resolved.activation.gated else g[:, None]
    scalars = torch.tensor(resolved.initial_scalars(), dtype=torch.float64)
    y = phi(resolved.activation, x, resolved.for_layer(0), scalars)[:, 0]
    y.backward(dy.double())
    return y.detach(), g.grad, u.grad


def functor_of(spec):
    return f"series_{spec.get('rho', 'gelu')}" if spec["name"] == "series" else spec["name"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_errors_of_special_functions_do_not_add_up(spec, mode):
    resolved, functor = resolve(spec), functor_of(spec)
    bound = TANH_BOUNDS.get(functor, BOUND)
    g = gates()
    u, dy = torch.full_like(g, 1.7), torch.full_like(g, -0.6)
    y, y_again, dg, du = (t.double() for t in fast(resolved, functor, MODES[mode], g, u, dy))
    true_y, true_dg, true_du = truth(resolved, g, u, dy)
    # a denormal on the way (a sigmoid, x^p) has fewer bits: units of fp32's smallest number, times what it multiplies
    denormals = 2**-145 * g.double().abs().clamp(min=1.0)
    within = true_y.abs() < LARGE
    for value in (y, y_again):
        assert ((value - true_y).abs() <= bound * true_y.abs() + denormals)[within].all()
    # dg crosses 0: relative to the larger of its terms. float64's own derivative cancels in the far tails.
    terms = true_dg.abs() + 0.6 * (true_y / g.double()).nan_to_num(nan=1.0).abs()
    assert ((dg - true_dg).abs() <= 2 * bound * terms + denormals + 1e-14)[true_dg.abs() < LARGE].all()
    if true_du is not None:
        assert ((du - true_du).abs() <= bound * true_du.abs() + denormals)[true_du.abs() < LARGE].all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_infinity_and_nan_agree_with_float64(spec):
    resolved, functor = resolve(spec), functor_of(spec)
    g = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0, 0.0, -0.0])
    u = torch.tensor([2.0, 2.0, 2.0, float("nan"), 2.0, 2.0])
    y, y_again, _, _ = fast(resolved, functor, 2, g, u, torch.ones_like(g))
    true_y = truth(resolved, g, u, torch.ones_like(g))[0]
    if spec["name"] == "crrelu":  # float64 has inf * exp(-inf) here; the functor takes the limit
        assert true_y[:2].isnan().all()
        true_y[:2] = torch.tensor([float("inf"), 0.0])
    bound = TANH_BOUNDS.get(functor, BOUND)
    torch.testing.assert_close(y.double(), true_y, rtol=bound, atol=1e-40, equal_nan=True)
    torch.testing.assert_close(y_again.double(), true_y, rtol=bound, atol=1e-40, equal_nan=True)
