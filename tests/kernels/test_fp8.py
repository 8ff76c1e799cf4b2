"""The fused FP8 operators against an independent quantiser, bit for bit where the activation itself is exact.

On the CPU they run the tile code of the CUDA kernel, with all its index arithmetic (kernels/csrc/fp8_tile.h); where a
GPU is, the same tests run on it too.
"""

import pytest
import torch

from ling.activations import ACTIVATIONS, resolve
from tests.kernels.fp8_reference import dequantize_rows, quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (T, F): whole tiles, tails in either direction and both, sixteen-byte runs and odd numbers, several tiles
SHAPES = ((1, 1), (128, 128), (3, 5), (144, 256), (256, 48), (130, 264), (257, 131))
ELEMENTWISE = sorted(name for name, row in ACTIVATIONS.items() if not row.rowwise)


def bits(t):
    return t.cpu().view(torch.uint8)


def check(results, y, power_of_2):
    """rows, row_scale_inv, columns, column_scale_inv of an operator are those of y."""
    rows, row_scales, columns, column_scales = (t.cpu() for t in results[:4])
    expected = quantize(y.cpu().reshape(-1, y.shape[-1]), power_of_2)
    assert rows.dtype == columns.dtype == torch.float8_e4m3fn
    assert torch.equal(row_scales, expected[1])
    assert torch.equal(column_scales, expected[3])
    assert torch.equal(bits(rows).reshape(expected[0].shape), expected[0])
    assert torch.equal(bits(columns), expected[2])


def identity(x, power_of_2):
    """The operator with phi(x) = x: leaky_relu of slope 1."""
    return torch.ops.ling.ffn_activation_fp8(x, None, torch.ones(1, device=x.device), "leaky_relu", [], power_of_2)


@pytest.mark.parametrize("power_of_2", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_are_the_quantised_unfused_ones(shape, dtype, power_of_2, device):
    tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    # rows of different sizes, so that the blocks have different scales; the router weights too
    sizes = torch.exp2(torch.randint(-6, 7, (tokens, 1), generator=generator).float())
    x = (torch.randn(tokens, 2 * width, generator=generator) * sizes).to(device, dtype)
    dy = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = torch.rand(tokens, generator=generator).to(device)
    g, u = (half.float() for half in x.chunk(2, -1))
    y = (g.relu() * u * weight[:, None]).to(dtype)
    check(torch.ops.ling.ffn_activation_fp8(x, weight, None, "reglu", [], power_of_2), y, power_of_2)
    upstream = dy.float() * weight[:, None]
    dx = torch.cat([upstream * u * (g > 0), upstream * g.relu()], -1).to(dtype)
    results = torch.ops.ling.ffn_activation_backward_fp8(dy, x, weight, None, "reglu", [], power_of_2, True, False)
    check(results, dx, power_of_2)
    truth = (g.double().relu() * u.double() * dy.double()).sum(-1)
    error = (results[4].double() - truth).abs()
    assert (error <= 1e-6 * (g.relu() * u * dy.float()).abs().double().sum(-1)).all()
    assert results[5].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_numbers_of_sixteen_bits(dtype, device):
    """An infinity in every block makes every scale 1, so that the bytes are plain casts: of each number there is."""
    if dtype == torch.float32:  # what is halfway between two e4m3 numbers, and its neighbours
        e4m3 = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        middle = (e4m3[1:] + e4m3[:-1]) / 2
        numbers = torch.cat([middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(1e9)), e4m3])
        numbers = torch.cat([numbers, -numbers])
    else:
        numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    x = torch.nn.functional.pad(numbers, (0, -numbers.numel() % 127)).reshape(-1, 127)
    infinite = torch.full((x.shape[0], 1), float("inf"), dtype=dtype)
    x = torch.cat([x, infinite], 1).to(device)
    check(identity(x, False), x, False)
    assert (identity(x, False)[1] == 1.0).all()


@pytest.mark.parametrize("power_of_2", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_zeros_infinities_nan_and_the_smallest_and_largest_numbers(dtype, power_of_2, device):
    info = torch.finfo(dtype)
    x = torch.zeros(8, 200, dtype=dtype)
    x[1, ::7] = info.max
    x[2, ::3] = info.smallest_normal
    x[3, 5] = torch.tensor(info.smallest_normal * info.eps, dtype=dtype)  # the smallest denormal
    x[4, 1], x[4, 2] = float("nan"), 3.0
    x[5, 190], x[5, 191] = float("-inf"), -1e4
    x[6] = float("nan")
    x[7] = -0.0
    x = x.to(device)
    check(identity(x, power_of_2), x, power_of_2)
    scalars = torch.ones(1, device=device)
    finite = torch.ones_like(x)
    results = torch.ops.ling.ffn_activation_backward_fp8(
        x, finite, None, scalars, "leaky_relu", [], power_of_2, False, True
    )
    check(results, x, power_of_2)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_activation(name, device):
    """Within e4m3's rounding of the unfused operator's result, and its small gradients."""
    resolved = resolve(name)
    params, initial = resolved.kernel_params(0), resolved.initial_scalars()
    generator = torch.Generator().manual_seed(1)
    tokens, width = 140, 130
    x = (
        (3 * torch.randn(tokens, width * (2 if resolved.activation.gated else 1), generator=generator))
        .bfloat16()
        .to(device)
    )
    dy = torch.randn(tokens, width, generator=generator).bfloat16().to(device)
    weight = torch.rand(tokens, generator=generator).to(device)
    scalars = torch.tensor(initial).to(device) if initial else None
    y = torch.ops.ling.ffn_activation(x, weight, scalars, name, params)
    forward = torch.ops.ling.ffn_activation_fp8(x, weight, scalars, name, params, True)
    arguments = (dy, x, weight, scalars, name, params)
    dx, dweight, dscalars = torch.ops.ling.ffn_activation_backward(*arguments, True, bool(initial))
    backward = torch.ops.ling.ffn_activation_backward_fp8(*arguments, True, True, bool(initial))
    for results, plain in ((forward, y), (backward, dx)):
        for data, scale_inv, truth in ((results[0], results[1], plain.float()), (*results[2:4], plain.float().T)):
            error = (dequantize_rows(data, scale_inv) - truth).abs()
            step = scale_inv[:, : truth.shape[0]].T.repeat_interleave(128, 1)[:, : truth.shape[1]]
            # half a unit of e4m3, or of its denormals; a unit of bf16 in which two policies of math may differ
            assert (error <= truth.abs() * (2**-4 + 2**-7) + step * 2**-10).all()
    torch.testing.assert_close(backward[4], dweight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(backward[5], dscalars, rtol=1e-4, atol=1e-2)


def test_strided_rows_leading_dimensions_and_no_tokens(device):
    wide = torch.randn(2, 66, 640, device=device)
    x = wide[..., :512]
    results = torch.ops.ling.ffn_activation_fp8(x, None, None, "reglu", [], True)
    g, u = x.chunk(2, -1)
    assert results[0].shape == (2, 66, 256)
    check(results, g.relu() * u, True)
    for tokens, width in ((0, 256), (4, 0)):
        x = torch.randn(tokens, 2 * width, device=device)
        rows, row_scales, columns, column_scales = torch.ops.ling.ffn_activation_fp8(x, None, None, "reglu", [], True)
        assert rows.shape == (tokens, width)
        assert columns.shape == (width, tokens)
        assert row_scales.shape == (-(-width // 128), tokens)
        assert column_scales.shape == (-(-tokens // 128), width)


@pytest.mark.parametrize("name", ["powlu", "polyrelu"])
def test_shapes_without_data_are_those_with(name, device):
    """For torch.compile and the meta device."""
    resolved = resolve(name)
    initial = resolved.initial_scalars()
    scalars = torch.tensor(initial, device=device) if initial else None
    x = torch.randn(3, 50, 2 * 130 if resolved.activation.gated else 130, device=device)
    dy, weight = torch.randn(3, 50, 130, device=device), torch.rand(3, 50, device=device)

    def call(move):
        moved, rest = [move(t) for t in (dy, x, weight)], (name, resolved.kernel_params(0), True)
        small = None if scalars is None else move(scalars)
        forward = torch.ops.ling.ffn_activation_fp8(*moved[1:], small, *rest)
        return [*forward, *torch.ops.ling.ffn_activation_backward_fp8(*moved, small, *rest, True, bool(initial))]

    for real, fake in zip(call(lambda t: t), call(lambda t: t.to("meta")), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_wrong_arguments(device):
    x = torch.randn(4, 6, device=device)
    call = torch.ops.ling.ffn_activation_fp8
    with pytest.raises(RuntimeError, match="no fused activation is called 'relu6'"):
        call(x, None, None, "relu6", [], True)
    with pytest.raises(RuntimeError, match="powlu takes 1 parameters, not 0"):
        call(x, None, None, "powlu", [], True)
    with pytest.raises(RuntimeError, match="weight has 3 numbers for 4 tokens"):
        call(x, torch.ones(3, device=device), None, "reglu", [], True)
    with pytest.raises(RuntimeError, match="gate and up side by side, not 5 columns"):
        call(x[:, :5], None, None, "reglu", [], True)
    with pytest.raises(RuntimeError, match="rows of"):
        torch.ops.ling.ffn_activation_backward_fp8(x, x, None, None, "reglu", [], True, False, False)
