"""The kernels' indexing: the functions that the CUDA kernels call, run on the host for every lane."""

import ctypes

import pytest
import torch

from tests.kernels.harness import host_harness, pointer

BITS = {torch.float32: 32, torch.bfloat16: 8, torch.float16: 16}
# (rows, width): less than a vector, odd, whole vectors, several turns of a warp, several tiles of rows
SHAPES = ((1, 1), (3, 7), (5, 32), (2, 2080), (33, 264), (70, 523))
GUARD = 64


def i64(*numbers):
    return [ctypes.c_int64(number) for number in numbers]


def rows_of(rows, width, dtype, stride, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, stride, generator=generator).to(dtype)[:, :width]


def guarded(rows, width, dtype):
    """A contiguous result full of NaN with a margin on both sides, and a check that the margins are untouched."""
    whole = torch.full((rows * width + 2 * GUARD,), float("nan"), dtype=dtype)
    result = whole[GUARD : GUARD + rows * width].view(rows, width)
    return result, lambda: whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all()


@pytest.mark.parametrize("warps", [1, 13, 1000], ids=lambda n: f"{n} warps")
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_forward_visits_every_number_once(dtype, shape, strided, warps):
    rows, width = shape
    stride = 2 * width + (16 if strided else 0)
    x, weight = rows_of(rows, 2 * width, dtype, stride, 0), torch.rand(rows)
    vector = width % (16 // dtype.itemsize) == 0
    y, untouched = guarded(rows, width, dtype)
    host_harness().forward(
        BITS[dtype], pointer(x), *i64(stride, rows, width), vector, pointer(weight), *i64(warps), 0, pointer(y)
    )
    g, u = x.float().chunk(2, -1)
    assert torch.equal(y, (g.relu() * u * weight[:, None]).to(dtype))
    assert untouched()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_backward_and_the_router_weights_gradient(dtype, shape):
    rows, width = shape
    vector = width % (16 // dtype.itemsize) == 0
    x, weight = rows_of(rows, 2 * width, dtype, 2 * width + 8, 1), torch.rand(rows)
    dy = rows_of(rows, width, dtype, width + 24, 2)
    dx, untouched = guarded(rows, 2 * width, dtype)
    dweight = torch.full((rows,), float("nan"))
    host_harness().backward(
        *(BITS[dtype], pointer(x), *i64(x.stride(0)), pointer(dy), *i64(dy.stride(0), rows, width), vector),
        *(pointer(weight), pointer(None), 0, pointer(dx), pointer(dweight), pointer(None)),
    )
    g, u = x.float().chunk(2, -1)
    upstream = dy.float() * weight[:, None]
    assert torch.equal(dx, torch.cat([upstream * u * (g > 0), upstream * g.relu()], -1).to(dtype))
    assert untouched()
    terms = g.double().relu() * u.double() * dy.double()
    assert ((dweight.double() - terms.sum(-1)).abs() <= 1e-6 * terms.abs().sum(-1)).all()


@pytest.mark.parametrize("shape", [*SHAPES, (1100, 24)], ids=str)
def test_scalars_gradients_are_summed_over_all_tiles(shape):
    rows, width = shape
    x, dy = rows_of(rows, width, torch.float32, width, 3), rows_of(rows, width, torch.float32, width, 4)
    weight, scalars = torch.rand(rows), torch.tensor([0.2, -0.3, 0.5, 0.7])
    dx, _ = guarded(rows, width, torch.float32)
    dweight, dscalars = torch.empty(rows), torch.empty(4)
    host_harness().backward(
        *(32, pointer(x), *i64(width), pointer(dy), *i64(width, rows, width), width % 4 == 0),
        *(pointer(weight), pointer(scalars), 4, pointer(dx), pointer(dweight), pointer(dscalars)),
    )
    r, upstream = x.double().relu(), dy.double() * weight.double()[:, None]
    for i, power in enumerate((3, 2, 1, 0)):
        terms = upstream * r**power
        assert (dscalars[i].double() - terms.sum()).abs() <= 1e-6 * terms.abs().sum()
    phi = sum(a * r**power for a, power in zip(scalars.double(), (3, 2, 1, 0), strict=True))
    terms = phi * dy.double()
    assert ((dweight.double() - terms.sum(-1)).abs() <= 1e-6 * terms.abs().sum(-1)).all()


def test_offsets_beyond_32_bits():
    """Row 3,000,001 of rows 2,048 wide starts at number 6,144,002,048."""
    width = 1024
    x, y = torch.randn(1, 2 * width).bfloat16(), torch.full((1, width), float("nan")).bfloat16()
    host_harness().far_row(pointer(x), *i64(2 * width, 3_000_001, width), pointer(y))
    g, u = x.float().chunk(2, -1)
    assert torch.equal(y, (g.relu() * u).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_of_top_k_keep_the_order(dtype):
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    keys, values = torch.empty(1 << 16, dtype=torch.int32), torch.empty(1 << 16)
    host_harness().topk_keys(BITS[dtype], pointer(numbers), *i64(1 << 16), pointer(keys), pointer(values))
    positive = numbers > 0
    assert (keys[~positive & ~numbers.isnan()] == 0).all()
    assert torch.equal(values[positive], numbers[positive].float())
    assert torch.equal(keys[positive].argsort(stable=True), numbers[positive].argsort(stable=True))
    assert (keys[numbers.isnan()] > keys[numbers == float("inf")]).all()
