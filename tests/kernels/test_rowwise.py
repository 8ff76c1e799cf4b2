"""PolyNorm and top-k: whole rows and shards of rows against the registry's math in float64."""

import pytest
import torch

from ling.activations import ACTIVATIONS, ops
from ling.activations.reference import phi
from tests.kernels.cases import DTYPES

A = [0.5, -0.25, 1.0, 0.125]
SHAPES = [(3, 1), (4, 7), (5, 129), (2, 3, 600), (0, 16)]


def draw(shape, dtype, seed=0):
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def polynorm_truth(x, weight, dy, eps=1e-6):
    """y, dx, dweight, dscalars in float64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    scalars = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    y = phi(ACTIVATIONS["polynorm"], x, {"eps": eps}, scalars) * weight[..., None]
    return y.detach(), *torch.autograd.grad(y, (x, weight, scalars), dy.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polynorm(shape, dtype, target):
    x, dy = draw(shape, dtype), draw(shape, dtype, 1)
    weight = torch.rand(shape[:-1]) + 0.25
    expected = polynorm_truth(x, weight, dy)
    inputs = [part.to(target).requires_grad_() for part in (x, weight, torch.tensor(A))]
    y = ops.polynorm(*inputs, eps=1e-6)
    assert y.dtype == dtype
    got = [y, *torch.autograd.grad(y, inputs, dy.to(target))]
    eps = torch.finfo(dtype).eps
    for ours, truth, slack in zip(got, expected, (4e-6, 4e-6, 1e-4, 1e-4), strict=True):
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=max(0.51 * eps, 4e-6), atol=slack)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e4])
def test_polynorm_at_other_scales(scale, target):
    """The statistics of large and tiny rows: x^6 from 1e-72 to 1e24."""
    x, dy, weight = draw((4, 64), torch.float32) * scale, draw((4, 64), torch.float32, 1), torch.ones(4)
    expected = polynorm_truth(x, weight, dy)
    inputs = [part.to(target).requires_grad_() for part in (x, weight, torch.tensor(A))]
    y = ops.polynorm(*inputs, eps=1e-6)
    got = [y, *torch.autograd.grad(y, inputs, dy.to(target))]
    for ours, truth in zip(got, expected, strict=True):
        size = truth.abs().max().item()
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=4e-6, atol=4e-6 * size)


def test_polynorm_over_shards_is_polynorm_of_the_whole(device):
    """Two shards whose sums are added: the same result and gradients; weight's and scalars' come in parts."""
    x, dy, weight = draw((6, 256), torch.float32), draw((6, 256), torch.float32, 1), torch.rand(6)
    whole = polynorm_truth(x, weight, dy)
    shards = [x[:, :128].to(device), x[:, 128:].to(device)]
    grads = [dy[:, :128].to(device), dy[:, 128:].to(device)]
    scalars, weight = torch.tensor(A, device=device), weight.to(device)
    sums = [torch.ops.ling.polynorm_sums(shard) for shard in shards]
    dots = [
        torch.ops.ling.polynorm_backward_sums(g, s, sums[0] + sums[1], weight, scalars, 256, 1e-6)[0]
        for g, s in zip(grads, shards, strict=True)
    ]
    parts = []
    for i in (0, 1):
        other = iter((sums[1 - i], dots[1 - i]))
        inputs = [part.clone().requires_grad_() for part in (shards[i], weight, scalars)]
        y = ops.polynorm(*inputs, eps=1e-6, width=256, reduce=lambda t, other=other: t + next(other))
        parts.append([y, *torch.autograd.grad(y, inputs, grads[i])])
    joined = [
        torch.cat([parts[0][0], parts[1][0]], -1),
        torch.cat([parts[0][1], parts[1][1]], -1),
        *(a + b for a, b in zip(parts[0][2:], parts[1][2:], strict=True)),
    ]
    for ours, truth in zip(joined, whole, strict=True):
        torch.testing.assert_close(ours.detach().cpu().double(), truth, rtol=1e-5, atol=1e-5)


def topk_truth(x, k):
    return phi(ACTIVATIONS["topk_relu"], x, {"k": k})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 64, 1000])
@pytest.mark.parametrize("kind", ["random", "ties", "negative", "nan"])
def test_topk(kind, k, dtype, target):
    x = draw((3, 9, 129), dtype)
    if kind == "ties":
        x = x.round()
    elif kind == "negative":
        x = -x.abs()
    elif kind == "nan":
        x[0, 0, 5] = float("nan")
        x[1, 2, ::3] = float("inf")
    dy, weight = draw(x.shape, dtype, 1), torch.rand(3, 9)
    kept = topk_truth(x.float(), min(k, 129))
    inputs = [x.to(target).requires_grad_(), weight.to(target).requires_grad_()]
    y = ops.topk_relu(*inputs, k)
    torch.testing.assert_close(y.cpu(), (kept * weight[..., None]).to(dtype), equal_nan=True, rtol=0, atol=0)
    if kind == "nan":
        return
    dx, dweight = torch.autograd.grad(y, inputs, dy.to(target))
    expected = (dy.float() * weight[..., None]).where(kept > 0, 0.0).to(dtype)
    assert torch.equal(dx.cpu(), expected)
    torch.testing.assert_close(dweight.cpu().double(), (kept * dy).double().sum(-1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 40, 60])
@pytest.mark.parametrize("rounded", [False, True])
def test_topk_over_shards_is_topk_of_the_whole(k, rounded, device):
    x = draw((20, 96), torch.float32)
    x = x.round() if rounded else x
    shards = list(x.chunk(3, -1))
    candidates = torch.stack([shard.clamp(min=0).topk(min(k, 32), dim=-1).values for shard in shards]).to(device)
    parts = [
        ops.topk_relu(shard.to(device), None, k, gather=lambda own: candidates, shard=i)
        for i, shard in enumerate(shards)
    ]
    assert torch.equal(torch.cat(parts, -1).cpu(), topk_truth(x, k))


def test_errors_say_what_is_wrong(device):
    x, scalars = torch.ones(2, 8, device=device), torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match="k must be at least 1"):
        ops.topk_relu(x, None, 0)
    with pytest.raises(RuntimeError, match="width"):
        ops.polynorm(x, None, scalars, 1e-6, width=4)
    with pytest.raises(RuntimeError, match="4"):
        ops.polynorm(x, None, scalars[:3], 1e-6)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, not torch.float64"):
        ops.polynorm(x.double(), None, scalars, 1e-6)
