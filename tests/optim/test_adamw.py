"""AdamW: torch's numbers, FusedAdam's state layout, and its place in megatron-core."""

import copy
import math

import pytest
import torch

from ling.optim.adamw import AdamW

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (11,), (), (0,), (64, 33)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def test_equals_torch():
    ours, theirs = parameters(), parameters()
    run(AdamW(ours, **SETTINGS), ours, 20)
    run(torch.optim.AdamW(theirs, **SETTINGS), theirs, 20)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


def test_equals_the_formula_in_float64():
    param = torch.nn.Parameter(torch.tensor([0.7, -1.3]))
    optimizer = AdamW([param], **SETTINGS)
    theta, m, v = param.tolist(), [0.0, 0.0], [0.0, 0.0]
    for t in range(1, 21):
        grads = [math.sin(t), math.cos(3 * t)]
        param.grad = torch.tensor(grads)
        optimizer.step()
        for i, g in enumerate(grads):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.95 * v[i] + 0.05 * g * g
            update = (m[i] / (1 - 0.9**t)) / (math.sqrt(v[i] / (1 - 0.95**t)) + 1e-8)
            theta[i] -= 3e-3 * (update + 0.1 * theta[i])
    torch.testing.assert_close(param.data.double(), torch.tensor(theta, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_state_layout_is_fused_adams():
    params = parameters()
    optimizer = AdamW(params, **SETTINGS)
    assert len(optimizer.state) == 0
    run(optimizer, params, 3)
    state = optimizer.state_dict()
    assert [group["step"] for group in state["param_groups"]] == [3]
    assert type(state["param_groups"][0]["step"]) is int
    for index, param in enumerate(params):
        assert set(state["state"][index]) == {"exp_avg", "exp_avg_sq"}
        for tensor in state["state"][index].values():
            assert (tensor.dtype, tensor.shape) == (torch.float32, param.shape)


def test_state_that_megatron_core_made_is_used():
    params = parameters()
    optimizer = AdamW(params, **SETTINGS)
    for param in params:
        optimizer.state[param]["exp_avg"] = torch.ones_like(param)
        optimizer.state[param]["exp_avg_sq"] = torch.ones_like(param)
    run(optimizer, params, 1)
    assert optimizer.state[params[0]]["exp_avg"].mean().item() == pytest.approx(0.9, abs=0.1)


def test_state_dict_round_trip_goes_on_bit_for_bit():
    params = parameters()
    optimizer = AdamW(params, **SETTINGS)
    run(optimizer, params, 5)
    resumed_params = copy.deepcopy(params)
    resumed = AdamW(resumed_params, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["step"] == 5
    assert resumed.param_groups[0]["weight_decay"] == 0.1
    run(optimizer, params, 5, first=5)
    run(resumed, resumed_params, 5, first=5)
    for a, b in zip(params, resumed_params, strict=True):
        assert torch.equal(a, b)


def test_a_state_dict_without_step_starts_at_zero():
    params = parameters()
    optimizer = AdamW(params, **SETTINGS)
    state = optimizer.state_dict()
    # FusedAdam's, before its first step
    del state["param_groups"][0]["step"]
    optimizer.load_state_dict(state)
    run(optimizer, params, 1)
    assert optimizer.param_groups[0]["step"] == 1


def test_parameters_without_gradient_stay():
    params = parameters()
    before = params[0].detach().clone()
    optimizer = AdamW([{"params": params[:2]}, {"params": [], "weight_decay": 0.0}], **SETTINGS)
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state
    # an empty group counts along, so that groups agree over ranks
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]


def test_groups_have_their_own_settings():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}], lr=0.5, weight_decay=0.1)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(params[0].data, torch.full((4,), 0.95))
    assert torch.equal(params[1].data, torch.ones(4))


def test_what_it_does_not_do_is_refused():
    param = torch.nn.Parameter(torch.ones(2))
    for key, value in (("adam_w_mode", False), ("bias_correction", False), ("capturable", True)):
        with pytest.raises(ValueError, match="AdamW"):
            AdamW([param], **{key: value})
    half = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match="fp32"):
        AdamW([half]).step()


def test_closure():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert (param < 1).all()
