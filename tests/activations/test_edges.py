"""What the functions do at the ends of the number range, at their kinks, and in fp32; the document's tables hold."""

import math
import re
from pathlib import Path

import pytest
import torch

from ling.activations.reference import phi
from ling.activations.table import ACTIVATIONS
from tests.activations.specs import NAMES, WIDTH, resolved

DOCUMENT = (Path(__file__).parents[2] / "docs" / "activations.md").read_text()
TINY, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
SIZES = [0.0, 1e-45, 1e-40, TINY, 1e-30, 1e-6, 0.01, 1.0, 3.0, 7.0, 50.0, 1e4, 1e15]
# fp32's error is relative to the value, times what the exponent in a tail multiplies it by
TAIL_ERROR = {"powlu": 2e-5, "gelu": 2e-5, "geglu": 2e-5, "geglu_tanh": 2e-5, "quick_geglu": 1e-5, "series": 2e-5}
# expm1's derivative is taken from its result, of whose digits few are left near -1
GRADIENT_ERROR = {"elu": 2e-2, "selu": 2e-2}
BANDS = [(1e-44, 1e-39), (1e-38, 1e-20), (1e-20, 1e-6), (1e-6, 1e-2), (1e-2, 1.0), (1.0, 10.0), (10.0, 100.0)]
BANDS += [(100.0, 1e4), (1e4, 1e6)]


def evaluate(name, x, **settings):
    """phi by the reference, and the gradients of the sum with respect to x and the scalars."""
    found = resolved(name, **settings)
    x = x.detach().requires_grad_()
    scalars = torch.tensor(found.initial_scalars(), dtype=x.dtype, requires_grad=True)
    y = phi(found.activation, x, found.for_layer(0), scalars)
    wanted = [x, scalars] if found.initial else [x]
    return y.detach(), *torch.autograd.grad(y.sum(), wanted)


def table(kind):
    """Rows `| `name` | cell | ... |` of the document's table whose header contains a text."""
    (header,) = [line for line in DOCUMENT.splitlines() if line.startswith("| name |") and kind in line]
    lines = DOCUMENT.split(header)[1].split("\n\n")[0].splitlines()[2:]
    return {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}


def rows(first, second=None):
    """Tokens of a gated FFN of width 1, or one token of an un-gated one with these numbers and zeros."""
    if second is not None:
        return torch.stack([first, second], -1)
    return torch.cat([first, first.new_zeros(max(0, WIDTH - len(first)))])[None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_every_finite_input(name, dtype):
    sizes = torch.tensor(SIZES + ([1e30, LARGEST] if dtype == torch.float64 else []), dtype=dtype)
    edges = torch.cat([sizes, -sizes])
    if name == "polynorm" and dtype == torch.float32:
        edges = edges[edges.abs() <= 1e6]
    inputs = torch.cartesian_prod(edges, edges) if ACTIVATIONS[name].gated else edges[None]
    powers = (0.05, 1.0, 9.9) if name == "powlu" else ()
    for settings in [{}, *({"m": m} for m in powers)]:
        y, *gradients = evaluate(name, inputs, **settings)
        if name != "polyrelu" or dtype == torch.float64:  # whose cube of 1e15 is beyond fp32
            assert torch.isfinite(y).all()
        assert all(torch.isfinite(gradient).all() for gradient in gradients[:1] if settings.get("m", 3) >= 1)
        assert not any(torch.isnan(gradient).any() for gradient in gradients)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"polynorm"}))  # which is documented to overflow in fp32
def test_the_gradient_is_no_nan_up_to_fp32s_largest_number(name):
    largest = torch.tensor([LARGEST, -LARGEST, 1e30, -1e30, 1e19, -1e19])
    inputs = rows(largest, torch.ones_like(largest)) if ACTIVATIONS[name].gated else rows(largest)
    _, gradient, *_ = evaluate(name, inputs)
    true_one_overflows = {"relu2": 2, "polyrelu": 2}.get(name, 0)
    assert (~torch.isfinite(gradient)).sum() <= true_one_overflows
    assert not torch.isnan(gradient).any()


def draw(name, low, high):
    """fc1's output with magnitudes spread evenly in their logarithm: over the elements, or over the rows."""
    generator = torch.Generator().manual_seed(11)
    row = ACTIVATIONS[name]
    sizes = torch.empty(2000 if row.gated else 100).uniform_(math.log(low), math.log(high), generator=generator).exp()
    if row.gated:
        return rows(sizes, torch.randn(2000, generator=generator))
    if row.rowwise:
        return sizes[:, None] * torch.empty(100, WIDTH).uniform_(0.5, 1.0, generator=generator)
    return sizes[:, None]


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fp32_in_each_band_of_magnitudes(name, band):
    x = draw(name, *band)
    for signed in (x, torch.cat([-x[:, :1], x[:, 1:]], -1)):
        (y, *gradients), (exact, *exact_gradients) = evaluate(name, signed), evaluate(name, signed.double())
        error = (y.double() - exact).abs()
        # of numbers around fp32's smallest normal one, and of what was multiplied from them, few digits are left
        assert (error <= TAIL_ERROR.get(name, 3e-6) * exact.abs() + 3e-36).all(), (error / exact.abs()).max()
        for found, truth in zip(gradients, exact_gradients, strict=True):
            limit = GRADIENT_ERROR.get(name, 1e-5) * truth.norm().item() + 3e-36
            assert (found.double() - truth).norm().item() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_table_of_infinities(dtype):
    cells = table("= -inf")
    assert set(cells) == set(NAMES)
    for name, (plus, minus, up_plus, up_minus) in cells.items():
        one, infinite = torch.ones(2, dtype=dtype), torch.tensor([math.inf, -math.inf], dtype=dtype)
        if ACTIVATIONS[name].gated:
            found = [*evaluate(name, rows(infinite, one))[0][:, 0], *evaluate(name, rows(one, infinite))[0][:, 0]]
        else:
            found = [evaluate(name, rows(value[None]))[0][0, 0] for value in infinite]
        expected = [float(cell) for cell in (plus, minus, up_plus, up_minus) if cell]
        torch.testing.assert_close(
            torch.stack(found).double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4, equal_nan=True
        )


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_nan(name):
    nan, one = torch.tensor([math.nan]), torch.ones(1)
    if ACTIVATIONS[name].gated:
        assert torch.isnan(evaluate(name, rows(nan, one))[0]).all()
        assert torch.isnan(evaluate(name, rows(one, nan))[0]).all()
        return
    y = evaluate(name, rows(nan))[0]
    assert torch.isnan(y[0, 0])
    assert torch.isnan(y).sum() == (WIDTH if name == "polynorm" else 1)
    many = evaluate(name, rows(torch.full((WIDTH,), math.nan)))[0]
    assert torch.isnan(many).all()


KINKS = {
    "powlu": (0.0, 1.0),
    "reglu": (0.0, 1.0),
    "fatreglu": (0.01, 1.0),
    "relu": (0.0,),
    "selu": (0.0,),
    "leaky_relu": (0.0,),
    "polyrelu": (0.0,),
    "crrelu": (0.0,),
}


def test_the_table_of_kinks():
    cells = table("kink")
    words = {"s": 0.01, "ε": 0.01}
    assert set(cells) - set(KINKS) == {"swiglu_clip", "swiglu_clip_post", "topk_relu"}  # tested on their own
    for name, point in KINKS.items():
        first = re.split(r"[ ,]", cells[name][1])[0]
        expected = words[first] if first in words else float(first)
        gradient = evaluate(name, torch.tensor([point], dtype=torch.float64))[1]
        assert gradient[0, 0].item() == pytest.approx(expected, abs=1e-4), name


def test_the_list_has_every_default():
    cells = table("scalars")
    assert set(cells) == set(NAMES)
    for name, (gated, _, parameters, scalars) in cells.items():
        row = ACTIVATIONS[name]
        assert gated == ("yes" if row.gated else "no")
        assert re.findall(r"`(\w+)`", parameters) == [entry.name for entry in row.parameters]
        assert re.findall(r"`(\w+)`", scalars) == [entry.name for entry in row.learnable]
        for entry in row.parameters:
            shown = re.search(rf"`{entry.name}` = ([\w.-]+)", parameters)
            assert (shown is None) == entry.required
            value = shown and shown[1].rstrip(".")
            assert entry.required or value == entry.default or float(value) == entry.default
