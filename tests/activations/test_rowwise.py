"""PolyNorm and top-k: a token's elements depend on each other, and the statistics may come from elsewhere."""

import math

import pytest
import torch

from ling.activations.reference import WholeRows, phi
from ling.activations.table import ACTIVATIONS
from tests.activations.specs import resolved


def draw(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polynorm(x, scalars, eps=1e-6, rows=None):
    return phi(ACTIVATIONS["polynorm"], x, {"eps": eps}, scalars, rows)


def topk(x, k, rows=None):
    return phi(ACTIVATIONS["topk_relu"], x, {"k": k}, rows=rows)


def test_polynorm_by_hand():
    x = [1.0, -2.0, 0.5]
    a3, a2, a1, a0 = 0.5, -0.3, 0.7, 0.1
    r1, r2, r3 = (1 / math.sqrt(sum(v ** (2 * k) for v in x) / 3 + 1e-6) for k in (1, 2, 3))
    expected = [a3 * v**3 * r3 + a2 * v**2 * r2 + a1 * v * r1 + a0 for v in x]
    y = polynorm(torch.tensor([x], dtype=torch.float64), torch.tensor([a3, a2, a1, a0], dtype=torch.float64))
    torch.testing.assert_close(y, torch.tensor([expected], dtype=torch.float64), rtol=1e-13, atol=1e-15)


def test_polynorms_gradients_are_the_published_ones():
    """dx = sum over k of a_k k x^(k-1) r (G - y mean(G y)); da_k = sum G y; da_0 = sum G."""
    x, upstream = draw(5, 12).requires_grad_(), draw(5, 12, seed=1)
    scalars = torch.tensor([0.5, -0.3, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    dx, da = torch.autograd.grad(polynorm(x, scalars, eps=0.1), (x, scalars), upstream)
    x, expected_dx, expected_da = x.detach(), torch.zeros_like(x), []
    for power, a in zip((3, 2, 1), scalars.tolist()[:3], strict=True):
        z = x**power
        r = 1 / torch.sqrt((z * z).mean(-1, keepdim=True) + 0.1)
        y = z * r
        mean = (upstream * y).mean(-1, keepdim=True)
        expected_dx += a * power * x ** (power - 1) * r * (upstream - y * mean)
        expected_da.append((upstream * y).sum())
    expected_da.append(upstream.sum())
    torch.testing.assert_close(dx, expected_dx, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(da, torch.stack(expected_da), rtol=1e-11, atol=1e-13)


class Recorded(WholeRows):
    """Row statistics that keep each mean, in the order of the calls."""

    def __init__(self):
        self.means = []

    def mean(self, x):
        self.means.append(super().mean(x))
        return self.means[-1]


class Shard(WholeRows):
    """Statistics of whole rows for a part of them: means known beforehand, and the rest of the rows at hand."""

    def __init__(self, means=(), rest=None):
        self.means, self.rest = list(means), rest

    def mean(self, x):
        return self.means.pop(0)

    def largest(self, x, k):
        return super().largest(torch.cat([x, self.rest.relu()], -1), k)[..., : x.shape[-1]]


def test_shards_with_the_whole_rows_statistics_give_the_whole_result():
    x, scalars = draw(4, 20), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    whole = Recorded()
    expected = polynorm(x, scalars, rows=whole)
    shards = x.split(10, -1)
    parts = [polynorm(shard, scalars, rows=Shard(whole.means)) for shard in shards]
    torch.testing.assert_close(torch.cat(parts, -1), expected, rtol=0, atol=0)
    assert not torch.equal(torch.cat([polynorm(shard, scalars) for shard in shards], -1), expected)
    left, right = shards
    parts = [topk(left, 3, Shard(rest=right)), topk(right, 3, Shard(rest=left))]
    torch.testing.assert_close(torch.cat(parts, -1), topk(x, 3), rtol=0, atol=0)


@pytest.mark.parametrize("k", [1, 3, 12])
def test_topk_keeps_the_largest(k):
    x = draw(50, 12, seed=3).requires_grad_()
    y = topk(x, k)
    (grad,) = torch.autograd.grad(y.sum(), x)
    for row, found, slopes in zip(x.tolist(), y.tolist(), grad.tolist(), strict=True):
        kept = sorted(range(12), key=lambda i: (-max(row[i], 0.0), i))[:k]
        expected = [max(v, 0.0) if i in kept else 0.0 for i, v in enumerate(row)]
        assert found == expected
        assert slopes == [float(v > 0) for v in expected]


def test_of_equal_numbers_topk_keeps_the_first():
    x = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0], [-1.0, -2.0, 0.0, -3.0, 3.0]], dtype=torch.float64)
    assert topk(x, 2).tolist() == [[0, 2, 2, 0, 0], [0, 0, 0, 0, 3]]
    assert topk(x, 4).tolist() == [[1, 2, 2, 2, 0], [0, 0, 0, 0, 3]]
    wide = torch.ones(1, 1000)
    assert topk(wide, 10)[0, :10].sum() == topk(wide, 10).sum() == 10


def test_topk_with_k_of_the_width_is_relu():
    x = draw(6, 9)
    torch.testing.assert_close(topk(x, 9), x.relu(), rtol=0, atol=0)
    assert resolved("topk_relu", k=9).for_layer(0) == {"k": 9}
