"""The operators as torch sees them: shapes, strides, threads, torch.compile, the meta device, recomputation, errors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ling.activations import ACTIVATIONS, ops
from tests.kernels.cases import CASES, DTYPES, arguments, resolved

SOME = ["powlu", "swiglu_clip", "polyrelu", "series_gelu"]


def draw(case, shape, dtype=torch.float32, seed=0):
    """x [.., H] for a result of this shape."""
    columns = shape[-1] * (2 if resolved(case).activation.gated else 1)
    return torch.randn(*shape[:-1], columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(case, x, dy, weight):
    """All results of both operators."""
    scalars, name, params = arguments(case, x.device.type)
    y = torch.ops.ling.ffn_activation(x, weight, scalars, name, params)
    needed = (weight is not None, scalars is not None)
    return y, *torch.ops.ling.ffn_activation_backward(dy, x, weight, scalars, name, params, *needed)


def test_every_activation_of_the_registry_has_a_kernel():
    assert {name for name in ACTIVATIONS if ops.has_kernel(name)} == ops.GATED | ops.UNGATED | ops.ROWWISE
    for name in ops.GATED | ops.UNGATED:
        assert ACTIVATIONS[name].gated == (name in ops.GATED)
    assert {resolved(case).activation.name for case in CASES} == ops.GATED | ops.UNGATED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("width", [1, 7, 129, 512, 5000])
def test_rows_do_not_depend_on_threads_or_order(width, case, dtype, device):
    x, dy = draw(case, (70, width), dtype).to(device), draw("relu", (70, width), dtype, 1).to(device)
    weight = torch.rand(70).to(device)
    y, dx, dweight, dscalars = call(case, x, dy, weight)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2)).to(device)
    for ours, expected in zip(call(case, x[order], dy[order], weight[order]), (y, dx, dweight), strict=False):
        assert torch.equal(ours, expected[order])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for ours, expected in zip(call(case, x, dy, weight), (y, dx, dweight, dscalars), strict=True):
                assert torch.equal(ours, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", SOME)
def test_strides_and_shapes(case, device):
    """Rows of a wider tensor, copies where rows are irregular, no rows, no columns, one row without a dimension."""
    scalars, name, params = arguments(case, device)
    x = draw(case, (4, 6, 33)).to(device)
    expected = ops.ffn_activation(x, None, scalars, name, params)
    wider = torch.cat([x, x], -1)[..., : x.shape[-1]]
    assert wider.stride(-2) != x.shape[-1]
    views = [wider, x.transpose(0, 1).contiguous().transpose(0, 1), x.transpose(0, 2).contiguous().transpose(0, 2)]
    for view in views:
        assert torch.equal(ops.ffn_activation(view, None, scalars, name, params), expected)
    assert torch.equal(ops.ffn_activation(x[0, 0], None, scalars, name, params), expected[0, 0])
    for shape in ((0, 5), (3, 0), (2, 0, 7)):
        x = draw(case, shape).to(device).requires_grad_()
        y = ops.ffn_activation(x, None, scalars, name, params)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_upstream_gradients_of_any_strides(device):
    x = draw("powlu", (5, 33)).to(device).requires_grad_()
    weight = torch.rand(5).to(device)
    y = ops.ffn_activation(x, weight, None, "powlu", [3.0])
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    for dy in (torch.ones((), device=device).expand_as(y), torch.ones(33, 5, device=device).T):
        assert torch.equal(torch.autograd.grad(y, x, dy, retain_graph=True)[0], expected)


@pytest.mark.parametrize("case", SOME)
def test_opcheck(case, device):
    scalars, name, params = arguments(case, device)
    x = draw(case, (4, 12)).to(device).requires_grad_()
    weight = torch.rand(4).to(device).requires_grad_()
    scalars = None if scalars is None else scalars.requires_grad_()
    torch.library.opcheck(torch.ops.ling.ffn_activation, (x, weight, scalars, name, params))
    plain = [None if part is None else part.detach() for part in (x, weight, scalars)]
    dy = torch.ones(4, 12, device=device)
    torch.library.opcheck(torch.ops.ling.ffn_activation_backward, (dy, *plain, name, params, True, True))


@pytest.mark.parametrize("name", sorted(ops.ROWWISE))
def test_opcheck_of_rowwise(name, device):
    x, dy, weight = torch.randn(4, 12, device=device), torch.ones(4, 12, device=device), torch.rand(4, device=device)
    check = torch.library.opcheck
    if name == "topk_relu":
        check(torch.ops.ling.topk_relu_threshold, (x, 3))
        chosen = torch.ops.ling.topk_relu_threshold(x, 3)
        check(torch.ops.ling.topk_relu, (x.clone().requires_grad_(), *chosen, weight.clone().requires_grad_()))
        check(torch.ops.ling.topk_relu_backward, (dy, x, *chosen, weight, True))
        return
    rest = (weight, torch.ones(4, device=device), 12, 1e-6)
    check(torch.ops.ling.polynorm_sums, (x,))
    sums = torch.ops.ling.polynorm_sums(x)
    check(torch.ops.ling.polynorm, (x, sums, *rest))
    check(torch.ops.ling.polynorm_backward_sums, (dy, x, sums, *rest))
    check(torch.ops.ling.polynorm_backward, (dy, x, sums, sums, *rest))


def block(x, weight, scalars):
    """Every kind of operator, in a graph with others."""
    y = ops.ffn_activation(x * 2, weight, None, "powlu", [3.0])
    y = ops.polynorm(y, weight, scalars, 1e-6)
    return ops.topk_relu(y + 1, weight, 3) * 3


def test_compile_and_recomputation_change_nothing(device):
    def inputs():
        generator = torch.Generator().manual_seed(3)
        parts = (torch.randn(6, 20, generator=generator), torch.rand(6, generator=generator), torch.ones(4))
        return [part.to(device).requires_grad_() for part in parts]

    results = []
    for function in (
        block,
        torch.compile(block, fullgraph=True, backend="aot_eager"),
        lambda *args: checkpoint(block, *args, use_reentrant=False),
    ):
        args = inputs()
        y = function(*args)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), args)])
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, expected)


def test_meta_device_gives_shapes():
    x, weight = torch.empty(3, 5, 24, dtype=torch.bfloat16, device="meta"), torch.empty(3, 5, device="meta")
    assert ops.ffn_activation(x, weight, None, "powlu", [3.0]).shape == (3, 5, 12)
    assert ops.topk_relu(x, weight, 3).shape == (3, 5, 24)
    assert ops.polynorm(x, weight, torch.empty(4, device="meta"), 1e-6).dtype == torch.bfloat16


def test_only_inputs_are_kept_for_the_backward_pass(device):
    kept = []
    x = draw("powlu", (4, 16)).to(device).requires_grad_()
    weight = torch.rand(4).to(device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        ops.ffn_activation(x, weight, None, "powlu", [3.0])
    assert sorted(kept) == sorted([x.data_ptr(), weight.data_ptr()])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 8, dtype=torch.float64)}, TypeError, "float32, bfloat16 or float16, not torch.float64"),
        ({"x": torch.ones(2, 7)}, RuntimeError, "gate and up side by side, not 7 columns"),
        ({"weight": torch.ones(3)}, RuntimeError, "weight has 3 numbers for 2 tokens"),
        ({"name": "swishglu"}, RuntimeError, "no fused activation is called 'swishglu'"),
        ({"params": []}, RuntimeError, "powlu takes 1 parameters, not 0"),
        ({"scalars": torch.ones(2)}, RuntimeError, "powlu takes 0 scalars, not 2"),
    ],
)
def test_errors_say_what_is_wrong(change, error, message, device):
    given = {"x": torch.ones(2, 8), "weight": None, "scalars": None, "name": "powlu", "params": [3.0]} | change
    given = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    with pytest.raises(error, match=message):
        ops.ffn_activation(**given)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="there are baseline, avx2, avx512"):
        ops.select_cpu_capability("avx9")


def test_more_parameters_than_tables_are_kept_for():
    """16-bit gates are looked up in tables, of which only so many stay; what is made again is the same."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    first = ops.ffn_activation(x, None, None, "powlu", [3.0])
    for step in range(100):
        ops.ffn_activation(x, None, None, "powlu", [1.0 + step / 100])
    assert torch.equal(ops.ffn_activation(x, None, None, "powlu", [3.0]), first)
