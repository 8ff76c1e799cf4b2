"""The CUDA operators on a GPU: accuracy against float64 by bands of the gate, and against the CPU's operators.

This is the only proof of what the special-function unit does (see kernels/README.md).
"""

import pytest
import torch

from ling.activations import ACTIVATIONS, ops, resolve
from ling.activations.reference import phi
from tests.kernels.test_fast_math import LARGE, SPECS, TANH_BOUNDS, functor_of, gates, truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(ops.problem("cuda") is not None, reason=str(ops.problem("cuda"))),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# a unit in the last place, relative to the smallest number that has it; fp32 has four: its arithmetic rounds as well
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-21}
# an argument of a special function is rounded: PowLU's exponent, up to 149; a sigmoid's, up to 104, GELU's cubic thrice
FP32_BOUNDS = {"powlu": 2**-16, "geglu_tanh": 2**-16, "quick_geglu": 2**-17, "swiglu_clip": 2**-17}
NAMES = [name for name, row in sorted(ACTIVATIONS.items()) if not row.rowwise]


def operands(name, tokens, width, dtype, stride=0, seed=0):
    """x [T, H] with this many numbers between rows, dy [T, F], weight [T], scalars or None: on the CPU."""
    resolved = resolve(name)
    generator = torch.Generator().manual_seed(seed)
    columns = width * (2 if resolved.activation.gated else 1)
    x = (3 * torch.randn(tokens, columns + stride, generator=generator)).to(dtype)[:, :columns]
    dy = torch.randn(tokens, width + stride, generator=generator).to(dtype)[:, :width]
    initial = resolved.initial_scalars()
    return x, dy, torch.rand(tokens, generator=generator), torch.tensor(initial) if initial else None, resolved


def on_gpu(*tensors):
    """Copies that keep their strides."""
    copies = []
    for tensor in tensors:
        if tensor is None:
            copies.append(None)
            continue
        base = tensor if tensor._base is None else tensor._base
        copies.append(base.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
    return copies


def backward(x, dy, weight, scalars, resolved):
    name, params = resolved.activation.name, resolved.kernel_params(0)
    return torch.ops.ling.ffn_activation_backward(
        dy, x, weight, scalars, name, params, weight is not None, scalars is not None
    )


def forward(x, weight, scalars, resolved):
    return torch.ops.ling.ffn_activation(x, weight, scalars, resolved.activation.name, resolved.kernel_params(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_accuracy_in_every_band(spec, dtype):
    resolved = resolve(spec)
    info = torch.finfo(dtype)
    if dtype == torch.float32:
        bound = FP32_BOUNDS.get(resolved.activation.name, ULP[dtype])
    else:
        bound = ULP[dtype] + TANH_BOUNDS.get(functor_of(spec), 0.0)
    g = gates().to(dtype)
    g = g[g.isfinite()]
    g = g[: g.numel() // 48 * 48]
    u, dy = torch.full_like(g, 1.7), torch.full_like(g, -0.6)
    gated, rows = resolved.activation.gated, (-1, 48)
    x = torch.cat([g.view(rows), u.view(rows)], -1) if gated else g.view(rows)
    initial = resolved.initial_scalars()
    scalars = torch.tensor(initial) if initial else None
    x_gpu, dy_gpu, scalars_gpu = on_gpu(x, dy.view(rows), scalars)
    y = forward(x_gpu, None, scalars_gpu, resolved).cpu().double().flatten()
    dx = backward(x_gpu, dy_gpu, None, scalars_gpu, resolved)[0].cpu().double()
    dg, du = (half.flatten() for half in (dx[:, :48], dx[:, 48:]))
    true_y, true_dg, true_du = truth(resolved, g.float(), u.float(), dy.float())
    # what the storage type cannot hold: beyond its largest number, and its denormals' spacing
    largest = min(0.99 * info.max, LARGE)
    spacing = info.smallest_normal * info.eps + 2**-145 * g.double().abs().clamp(min=1.0)
    for value, true in ((y, true_y), *(((du, true_du),) if gated else ())):
        assert ((value - true).abs() <= bound * true.abs() + spacing)[true.abs() < largest].all()
    terms = true_dg.abs() + 0.6 * (true_y / g.double()).nan_to_num(nan=1.0).abs()
    error = (dg - true_dg).abs()
    assert (error <= 2 * bound * terms + spacing + 1e-14)[true_dg.abs() < largest].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_less_accurate_than_twice_eager(name, dtype):
    x, _, _, scalars, resolved = operands(name, 64, 1024, dtype)
    wide = None if scalars is None else scalars.double()
    true = phi(resolved.activation, x.double(), resolved.for_layer(0), wide)
    eager = phi(resolved.activation, x.float(), resolved.for_layer(0), scalars).to(dtype)
    fused = forward(*on_gpu(x, None, scalars), resolved).cpu()
    size = true.abs().clamp(min=1e-3)
    error, eager_error = (((value.double() - true).abs() / size).max() for value in (fused, eager))
    assert error <= max(2 * eager_error, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 4096), (300, 264), (257, 1000), (4100, 64)], ids=str)
@pytest.mark.parametrize("name", ["powlu", "swiglu_clip", "gelu", "polyrelu", "series"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_as_on_the_cpu(dtype, name, shape, weight_dtype):
    x, dy, weight, scalars, resolved = operands(name, *shape, dtype, stride=8)
    weight = None if weight_dtype is None else weight.to(weight_dtype)
    x_gpu, dy_gpu, weight_gpu, scalars_gpu = on_gpu(x, dy, weight, scalars)
    assert x_gpu.stride() == x.stride()
    ulp = torch.finfo(dtype).eps * (1 if dtype != torch.float32 else 16)
    y, y_gpu = forward(x, weight, scalars, resolved), forward(x_gpu, weight_gpu, scalars_gpu, resolved)
    torch.testing.assert_close(y_gpu.cpu(), y, rtol=ulp, atol=ulp / 64)
    small = {"rtol": 1e-2 if weight_dtype in (torch.bfloat16, torch.float16) else 1e-3, "atol": 1e-2}
    results = backward(x, dy, weight, scalars, resolved)
    results_gpu = backward(x_gpu, dy_gpu, weight_gpu, scalars_gpu, resolved)
    torch.testing.assert_close(results_gpu[0].cpu(), results[0], rtol=2 * ulp, atol=ulp)
    torch.testing.assert_close(results_gpu[1].cpu(), results[1], **small)
    torch.testing.assert_close(results_gpu[2].cpu(), results[2], rtol=1e-3, atol=1e-2 * shape[0] ** 0.5)


@pytest.mark.parametrize("name", ["powlu", "polyrelu"])
def test_bit_for_bit_the_same_again(name):
    x, dy, weight, scalars, resolved = operands(name, 3000, 512, torch.bfloat16)
    x, dy, weight, scalars = on_gpu(x, dy, weight, scalars)
    first = [forward(x, weight, scalars, resolved), *backward(x, dy, weight, scalars, resolved)]
    for _ in range(5):
        again = [forward(x, weight, scalars, resolved), *backward(x, dy, weight, scalars, resolved)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_captured_in_a_graph_and_replayed_on_other_numbers():
    x, dy, weight, scalars, resolved = operands("polyrelu", 200, 384, torch.bfloat16)
    x, dy, weight, scalars = on_gpu(x, dy, weight, scalars)
    gated = resolve("powlu")
    pair = torch.cat([x, x], -1)

    def step():
        threshold, ties = torch.ops.ling.topk_relu_threshold(x, 17)
        sums = torch.ops.ling.polynorm_sums(x)
        return [
            forward(x, weight, scalars, resolved),
            *backward(x, dy, weight, scalars, resolved),
            *torch.ops.ling.ffn_activation_backward_fp8(dy, pair, weight, None, "powlu", [3.0], True, True, False),
            forward(pair, weight, None, gated),
            torch.ops.ling.topk_relu(x, threshold, ties, weight),
            torch.ops.ling.polynorm(x, sums, weight, scalars, 384, 1e-6),
            *torch.ops.ling.polynorm_backward_sums(dy, x, sums, weight, scalars, 384, 1e-6),
        ]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in (x, dy, pair):
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()
    for result, expected in zip(captured, step(), strict=True):
        assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8))


def test_runs_on_the_current_stream():
    x, _, _, _, resolved = operands("powlu", 64, 256, torch.bfloat16)
    (x,) = on_gpu(x)
    expected = forward(x, None, None, resolved)
    late = torch.empty_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # the copy comes late on this stream; on another, y would be of old numbers
        late.copy_(x)
        y = forward(late, None, None, resolved)
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_more_than_2_to_31_elements():
    tokens, width = 70_000, 16_384  # x: 2.3e9 elements, 4.6 GB
    if torch.cuda.mem_get_info()[0] < 25 << 30:
        pytest.skip("less than 25 GiB of free GPU memory")
    resolved = resolve("powlu")
    x = torch.zeros(tokens, 2 * width, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.randn(3, 2 * width)
    dy = torch.ones(tokens, width, dtype=torch.bfloat16, device="cuda")
    weight = torch.rand(tokens, device="cuda")
    assert torch.equal(forward(x, weight, None, resolved)[-3:], forward(x[-3:], weight[-3:], None, resolved))
    dx, dweight, _ = backward(x, dy, weight, None, resolved)
    few = backward(x[-3:], dy[-3:], weight[-3:], None, resolved)
    assert torch.equal(dx[-3:], few[0])
    assert torch.equal(dweight[-3:], few[1])


@pytest.mark.parametrize("name", ["powlu", "polyrelu"])
@pytest.mark.parametrize("shape", [(0, 64), (4, 0)], ids=str)
def test_nothing_to_do(name, shape):
    x, dy, weight, scalars, resolved = operands(name, *shape, torch.bfloat16)
    x, dy, weight, scalars = on_gpu(x, dy, weight, scalars)
    assert forward(x, weight, scalars, resolved).shape == shape
    dx, dweight, dscalars = backward(x, dy, weight, scalars, resolved)
    assert dx.shape == x.shape
    assert (dweight == 0).all()
    assert (dscalars == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (70, 264), (33, 4001)], ids=str)
def test_polynorm_as_on_the_cpu(shape, dtype):
    x, dy, weight, _, _ = operands("relu", *shape, dtype, stride=8)
    scalars, width = torch.tensor([0.5, -0.4, 0.3, 0.2]), shape[1] + 100
    x_gpu, dy_gpu, weight_gpu, scalars_gpu = on_gpu(x, dy, weight, scalars)
    sums, sums_gpu = torch.ops.ling.polynorm_sums(x), torch.ops.ling.polynorm_sums(x_gpu)
    torch.testing.assert_close(sums_gpu.cpu(), sums, rtol=1e-5, atol=0)
    call, call_gpu = (sums, weight, scalars, width, 1e-6), (sums.cuda(), weight_gpu, scalars_gpu, width, 1e-6)
    ulp = 4 * torch.finfo(dtype).eps
    y, y_gpu = torch.ops.ling.polynorm(x, *call), torch.ops.ling.polynorm(x_gpu, *call_gpu)
    torch.testing.assert_close(y_gpu.cpu(), y, rtol=ulp, atol=ulp)
    parts = torch.ops.ling.polynorm_backward_sums(dy, x, *call)
    parts_gpu = torch.ops.ling.polynorm_backward_sums(dy_gpu, x_gpu, *call_gpu)
    for part, part_gpu in zip(parts, parts_gpu, strict=True):
        torch.testing.assert_close(part_gpu.cpu(), part, rtol=1e-4, atol=1e-3)
    dots = parts[0]
    dx = torch.ops.ling.polynorm_backward(dy, x, sums, dots, *call[1:])
    dx_gpu = torch.ops.ling.polynorm_backward(dy_gpu, x_gpu, sums.cuda(), dots.cuda(), *call_gpu[1:])
    torch.testing.assert_close(dx_gpu.cpu(), dx, rtol=2 * ulp, atol=2 * ulp)


@pytest.mark.parametrize("k", [1, 20, 100_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (70, 264), (33, 4001)], ids=str)
def test_topk_relu_as_on_the_cpu(shape, dtype, k):
    x, dy, weight, _, _ = operands("relu", *shape, dtype, stride=8)
    x[0] = 1.0  # ties only
    x[-1, ::3] = 2.5
    if shape[0] > 3:
        x[1] = -1.0
        x[2, 0], x[2, -1], x[3] = float("nan"), float("inf"), float("nan")
    x_gpu, dy_gpu, weight_gpu = on_gpu(x, dy, weight)
    threshold, ties = torch.ops.ling.topk_relu_threshold(x, k)
    threshold_gpu, ties_gpu = torch.ops.ling.topk_relu_threshold(x_gpu, k)
    assert torch.equal(threshold_gpu.cpu(), threshold)
    assert torch.equal(ties_gpu.cpu(), ties)
    y = torch.ops.ling.topk_relu(x, threshold, ties, weight)
    y_gpu = torch.ops.ling.topk_relu(x_gpu, threshold_gpu, ties_gpu, weight_gpu)
    torch.testing.assert_close(y_gpu.cpu(), y, rtol=0, atol=0, equal_nan=True)
    dx, dweight = torch.ops.ling.topk_relu_backward(dy, x, threshold, ties, weight, True)
    dx_gpu, dweight_gpu = torch.ops.ling.topk_relu_backward(dy_gpu, x_gpu, threshold_gpu, ties_gpu, weight_gpu, True)
    torch.testing.assert_close(dx_gpu.cpu(), dx, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dweight_gpu.cpu(), dweight, rtol=1e-5, atol=1e-4, equal_nan=True)
