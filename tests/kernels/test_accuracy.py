"""Every fused activation against the registry's math in float64, over all sizes of input."""

import math

import pytest
import torch

from ling.activations import ops
from tests.kernels.cases import CASES, DTYPES, arguments, bands, resolved, truth, ulps

# approximate instructions of the GPU: more in fp32, no more where the result is rounded to 16 bits
CUDA_ULPS = {torch.float32: 24.0, torch.bfloat16: 1.0, torch.float16: 1.0}


def run(case, x, dy, device, weight=None):
    """y, dx, dweight and dscalars of the operators."""
    scalars, name, params = arguments(case, device)
    x, dy = x.to(device), dy.to(device)
    y = torch.ops.ling.ffn_activation(x, weight, scalars, name, params)
    grads = torch.ops.ling.ffn_activation_backward(
        dy.contiguous(), x, weight, scalars, name, params, weight is not None, scalars is not None
    )
    return tuple(part.cpu() for part in (y, *grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_in_ulps(case, dtype, target):
    x, dy, expected, eager = truth(case, dtype)
    gated = resolved(case).activation.gated
    width = x.shape[-1] // 2 if gated else x.shape[-1]
    gate, up = x[:1, :width], x[:, -1:] if gated else torch.ones(1, 1)
    got = run(case, x, dy, target)
    fp32 = dtype == torch.float32
    allowed = CASES[case][1 if fp32 else 2]
    if target == "cuda":
        allowed = max(allowed, CUDA_ULPS[dtype])
    parts = [("y", 0, slice(None)), ("dgate", 1, slice(0, width))] + ([("dup", 1, slice(width, None))] if gated else [])
    for what, index, part in parts:
        ours, size = ulps(got[index][:, part], expected[index][:, part], gate, up)
        theirs, _ = ulps(eager[index][:, part].nan_to_num(math.inf), expected[index][:, part], gate, up)
        # the rounding of an exponent counts as often as the exponent is large
        exponent = size.clamp(min=1e-45).log().abs() * fp32
        excess = ours / torch.maximum(2 * theirs, allowed + exponent)
        row, column = divmod(int(excess.argmax()), excess.shape[1])
        place = gate[0][bands(gate)[0] == bands(gate).unique()[column]]
        assert excess.max() <= 1, (
            f"{what}: {ours[row, column]:.2f} ulps, eager {theirs[row, column]:.2f}, for gates "
            f"{place.min():.4g} to {place.max():.4g}, up {up[row, 0]:.4g}"
        )


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_weight_and_sums(case, dtype, weight_dtype, target):
    """The router weight inside, its gradient and the scalars': sums, in relation to the sum of absolute values."""
    generator = torch.Generator().manual_seed(1)
    width = 129
    columns = 2 * width if resolved(case).activation.gated else width
    x = (2 * torch.randn(5, 7, columns, generator=generator)).to(dtype)
    dy = torch.randn(5, 7, width, generator=generator).to(dtype)
    weight = torch.rand(5, 7, generator=generator).to(weight_dtype)
    y, dx, dweight, dscalars = run(case, x, dy, target, weight.to(target))
    wide = [part.double().requires_grad_() for part in (x, weight)]
    found = resolved(case)
    scalars = torch.tensor(found.initial_scalars(), dtype=torch.float64).expand(35, -1).clone().requires_grad_()
    phi = torch.stack(
        [
            _phi(found, token, scalars[i] if found.activation.learnable else None)
            for i, token in enumerate(wide[0].flatten(0, 1))
        ]
    ).unflatten(0, (5, 7))
    product = phi * wide[1][..., None] * dy.double()
    grads = torch.autograd.grad(product.sum(), [*wide, *([scalars] if found.activation.learnable else [])])
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 4e-5 if target == "cuda" else 1e-6}
    torch.testing.assert_close(y.double(), (phi * wide[1][..., None]).detach(), **close)
    torch.testing.assert_close(dx.double(), grads[0], **close)
    precision = 1e-5 if target == "cuda" else 5e-7
    size = (phi * dy.double()).abs().sum(-1)
    assert dweight.dtype == weight_dtype
    assert (
        (dweight.double() - grads[1]).abs() <= torch.finfo(weight_dtype).eps * grads[1].abs() + precision * size
    ).all()
    if found.activation.learnable:
        # each token's part is itself a sum over F; 8 covers how far those parts cancel
        size = grads[2].abs().sum(0) + (product.abs().sum() / 100)
        assert ((dscalars.double() - grads[2].sum(0)).abs() <= 8 * precision * size).all()


def _phi(found, token, scalars):
    from ling.activations.reference import phi

    return phi(found.activation, token, found.for_layer(0), scalars)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_nan_and_infinity(case, dtype, target):
    """NaN goes through; at infinity the result is truth's where truth has one."""
    found = resolved(case).activation
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -2.0, 0.5], dtype=dtype)
    x = torch.cartesian_prod(special, special).T.reshape(1, -1) if found.gated else special[None]
    width = x.shape[-1] // 2 if found.gated else x.shape[-1]
    y, dx, *_ = run(case, x, torch.ones(1, width, dtype=dtype), target)
    expected, _ = _expected(case, x)
    nan_in = x.unflatten(-1, (2, width)).isnan().any(1) if found.gated else x.isnan()
    assert y[nan_in].isnan().all()
    defined = ~expected.isnan() & ~nan_in
    assert defined.sum() >= 3
    rounded = expected.to(dtype)
    torch.testing.assert_close(y[defined], rounded[defined], rtol=8 * torch.finfo(dtype).eps, atol=0)


def _expected(case, x):
    from tests.kernels.cases import evaluate

    return evaluate(
        case, x, torch.ones(x.shape[0], x.shape[1] // (2 if resolved(case).activation.gated else 1)), torch.float64
    )


def test_capabilities_agree_and_the_default_is_the_best():
    if ops.problem("cpu") is not None:
        pytest.skip(ops.problem("cpu"))
    best = ops.cpu_capability()
    x = torch.randn(64, 2 * 129, generator=torch.Generator().manual_seed(2))
    try:
        results = {}
        for capability in ops.CPU_CAPABILITIES[: ops.CPU_CAPABILITIES.index(best) + 1]:
            ops.select_cpu_capability(capability)
            assert ops.cpu_capability() == capability
            results[capability] = ops.ffn_activation(x, None, None, "powlu", [3.0])
    finally:
        ops.select_cpu_capability(best)
    for y in results.values():
        torch.testing.assert_close(y, results["baseline"], rtol=1e-6, atol=1e-7)
