"""The router: which experts are chosen, the bias that balances them, and what is counted."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ling.model.build import LingModel
from ling.model.router import LingRouter, routers, update_expert_bias
from tests.dist.training import MOE, SyntheticStream, batch_of, build_single, tiny_config
from tests.model import reference

pytestmark = pytest.mark.ranks(1)

EXPERTS, RATE = 8, 1e-3


def build(**model) -> LingModel:
    return build_single(tiny_config(dist.get_world_size(), model=replace(MOE, num_layers=2, **model)))


def router_of(chunk: LingModel) -> LingRouter:
    return next(routers([chunk]))


@pytest.mark.parametrize(
    ("topk", "groups", "group_topk"),
    [(2, 4, 2), (4, 4, 2), (1, 4, 1), (3, 2, 1), (2, 4, 4), (8, 4, 4), (2, 1, 1), (3, None, None)],
)
def test_choice(topk, groups, group_topk):
    router = router_of(build(moe_router_topk=topk, moe_router_num_groups=groups, moe_router_group_topk=group_topk))
    scores = torch.rand(200, EXPERTS, generator=torch.Generator().manual_seed(0))
    router.expert_bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    biased = router.choose(scores)
    assert torch.equal(biased, reference.choose_experts(scores + router.expert_bias, topk, groups, group_topk))
    router.expert_bias.zero_()
    plain = router.choose(scores)
    assert torch.equal(plain, reference.choose_experts(scores, topk, groups, group_topk))
    assert torch.equal(plain, biased) == (topk == EXPERTS and bool((plain == biased).all()))


def test_weights_are_of_the_scores_without_bias_and_in_fp32():
    chunk = build().bfloat16().eval()
    router = router_of(chunk)
    router.expert_bias.copy_(torch.tensor([0.0, 0, 0, 9, 9, 0, 0, 0]))  # these two, whatever the token
    hidden = torch.randn(6, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights, chosen = router(hidden)
    assert weights.dtype == torch.float32
    assert chosen.nonzero()[:, 1].view(12, 2).tolist() == [[3, 4]] * 12
    scores = torch.sigmoid(hidden.view(12, 64).double() @ router.weight.double().T)[:, 3:5]
    torch.testing.assert_close(weights[:, 3:5].double(), 2.5 * scores / scores.sum(1, keepdim=True))
    assert torch.equal(weights != 0, chosen)


LOAD = [10.0, 2.0, 2.0, 2.0, 8.0, 0.0, 4.0, 4.0]  # 4 on average
SIGN = [-1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 0.0, 0.0]  # 2 more experts get more than get less


@pytest.mark.parametrize(
    ("centering", "once", "twice"),
    [
        ("none", SIGN, [2 * sign for sign in SIGN]),
        ("update", [sign - 0.25 for sign in SIGN], [2 * sign - 0.5 for sign in SIGN]),
        ("bias", [sign - 0.25 for sign in SIGN], [2 * sign - 0.5 for sign in SIGN]),
    ],
)
def test_bias_update(centering, once, twice):
    chunk = build(moe_router_bias_centering=centering)
    for expected in (once, twice):
        for router in routers([chunk]):
            router.local_tokens_per_expert.copy_(torch.tensor(LOAD))
        update_expert_bias([chunk])
        for router in routers([chunk]):
            torch.testing.assert_close(router.expert_bias, RATE * torch.tensor(expected))
            assert router.local_tokens_per_expert.abs().sum() == 0


def test_only_centering_of_the_bias_mends_one_that_is_off():
    off = torch.full((EXPERTS,), 0.5)
    for centering, mean in (("none", 0.5 + 0.25 * RATE), ("update", 0.5), ("bias", 0.0)):
        chunk = build(moe_router_bias_centering=centering)
        router = router_of(chunk)
        router.expert_bias.copy_(off)
        router.local_tokens_per_expert.copy_(torch.tensor(LOAD))
        update_expert_bias([chunk])
        assert float(router.expert_bias.mean()) == pytest.approx(mean, abs=1e-7)


@pytest.mark.ranks(2)
def test_the_load_is_that_of_all_ranks():
    chunk = build(moe_router_bias_centering="none")
    router = router_of(chunk)
    # each rank alone would lower expert 0 or expert 1; together both have the mean
    load = torch.zeros(EXPERTS)
    load[dist.get_rank()] = 4.0
    load[2] = 1.0
    load[3:] = 2.0
    router.local_tokens_per_expert.copy_(load)
    update_expert_bias([chunk])
    torch.testing.assert_close(router.expert_bias, RATE * torch.tensor([-1.0, -1, 1, -1, -1, -1, -1, -1]))


def test_what_is_counted():
    chunk = build()
    batch = batch_of(SyntheticStream(), 0, 2)
    arguments = (batch["tokens"], batch["position_ids"], None)
    with torch.no_grad():
        chunk.eval()(*arguments, labels=batch["labels"])
    assert all(router.local_tokens_per_expert.sum() == 0 for router in routers([chunk]))
    chunk.train()
    for passes in (1, 2):
        chunk(*arguments, labels=batch["labels"])
        for router in routers([chunk]):
            assert router.local_tokens_per_expert.sum() == passes * 2 * 32 * 2
            assert router.local_tokens_per_expert.max() <= passes * 2 * 32


def test_the_bias_stays_in_fp32():
    chunk = build()
    for router in routers([chunk]):
        router.expert_bias.fill_(0.1234567)
        router.local_tokens_per_expert.fill_(257.0)
    for change in (LingModel.bfloat16, LingModel.half, lambda model: model.to(torch.float64)):
        change(chunk)
        for router in routers([chunk]):
            assert router.weight.dtype != torch.float32
            assert router.expert_bias.dtype == router.local_tokens_per_expert.dtype == torch.float32
            assert torch.equal(router.expert_bias, torch.full((EXPERTS,), 0.1234567))
            assert torch.equal(router.local_tokens_per_expert, torch.full((EXPERTS,), 257.0))


def test_what_is_kept():
    names = [name for name in build().state_dict() if "router" in name and "mtp" not in name]
    assert [name.rpartition(".")[2] for name in names] == ["weight", "expert_bias"]
    without = build(moe_router_enable_expert_bias=False)
    assert not any("expert_bias" in name for name in without.state_dict())
    before = router_of(without).weight.clone()
    update_expert_bias([without])  # nothing to move
    assert torch.equal(router_of(without).weight, before)


def test_router_losses_are_of_training_only():
    router = router_of(build(moe_z_loss_coeff=1.0, moe_aux_loss_coeff=1.0))
    hidden = torch.randn(6, 2, 64, generator=torch.Generator().manual_seed(0))

    def gradient() -> torch.Tensor:
        weights, _ = router(hidden)
        (grad,) = torch.autograd.grad(weights.sum() * 0, router.weight)
        return grad

    assert router.train()
    assert gradient().abs().max() > 0
    assert router.eval()
    assert gradient().abs().max() == 0
