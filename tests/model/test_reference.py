"""The reference decoder against values known by hand: it is the yardstick, so it is measured first."""

import math

import pytest
import torch

from tests.model import reference
from tests.model.reference import ReferenceModel, ReferenceSizes

SIZES = ReferenceSizes(
    num_layers=3,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    first_k_dense_replace=1,
    num_moe_experts=8,
    moe_router_topk=4,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    moe_router_topk_scaling_factor=2.5,
    mtp_num_layers=1,
    moe_z_loss_coeff=0.01,
    moe_aux_loss_coeff=0.02,
)
VOCAB, FFN, EXPERT_FFN = 32, 24, 12


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """float64 weights of the SIZES above, norms near 1, an expert bias that matters."""
    hidden, head = SIZES.hidden_size, SIZES.kv_channels
    heads, groups, experts = SIZES.num_attention_heads, SIZES.num_query_groups, SIZES.num_moe_experts
    attention = {
        "input_layernorm": (hidden,),
        "self_attention.linear_qkv": ((heads + 2 * groups) * head, hidden),
        "self_attention.q_layernorm": (head,),
        "self_attention.k_layernorm": (head,),
        "self_attention.linear_proj": (hidden, heads * head),
        "pre_mlp_layernorm": (hidden,),
    }
    dense = {"mlp.linear_fc1": (2 * FFN, hidden), "mlp.linear_fc2": (hidden, FFN)}
    moe = {
        "mlp.router": (experts, hidden),
        "mlp.experts.weight1": (experts, 2 * EXPERT_FFN, hidden),
        "mlp.experts.weight2": (experts, hidden, EXPERT_FFN),
        "mlp.shared_experts.linear_fc1": (2 * EXPERT_FFN, hidden),
        "mlp.shared_experts.linear_fc2": (hidden, EXPERT_FFN),
    }
    mtp = {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden), "final_layernorm": (hidden,)}
    shapes = {"embedding.word_embeddings": (VOCAB, hidden), "output_layer": (VOCAB, hidden)}
    shapes["decoder.final_layernorm"] = (hidden,)
    parts = {"decoder.layers.0.": attention | dense, "mtp.layers.0.": mtp}
    parts |= dict.fromkeys(("decoder.layers.1.", "decoder.layers.2."), attention | moe)
    parts["mtp.layers.0.transformer_layer."] = attention | moe
    for prefix, part in parts.items():
        shapes |= {prefix + name: shape for name, shape in part.items()}

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        name = name if name.endswith(("weight1", "weight2")) else name + ".weight"
        weights[name] = 1 + 0.1 * value if len(shape) == 1 else 0.3 * value
        if name.endswith("router.weight"):
            bias = torch.randn(experts, generator=generator, dtype=torch.float64)
            weights[name.replace("weight", "expert_bias")] = 0.1 * bias
    return weights


def random_tokens(batch: int = 2, length: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("gate", "value"),
    [(0.1, 0.0028), (1, 0.7311), (2, 2.084), (4, 3.928), (16, 5.278), (100, 3.51), (1e4, 1.31), (-2, -0.2384)],
)
def test_powlu_has_the_published_values(gate, value):
    ours = reference.powlu(torch.tensor([gate, 1.0], dtype=torch.float64)).item()
    digits = len(str(value).split(".")[1])
    assert round(ours, digits) == value


@pytest.mark.parametrize("x", [0.3, 2.0, 12.9, 50.0, -1.5])
def test_powlu_gradient_is_the_closed_form(x):
    gate = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = reference.powlu_gate(gate)
    value.backward()
    s, f, m = 1 / (1 + math.exp(-x)), value.item(), 3.0
    if x > 0:
        r = math.sqrt(x)
        expected = f * (m / (r + 1) / x - m / (2 * r * (r + 1) ** 2) * math.log(x) + 1 - s)
    else:
        expected = s * (1 + x * (1 - s))
    assert gate.grad.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "parameters", "fc1", "expected"),
    [
        ("swiglu", {}, [1.0, 3.0], 3 * 0.7310585786),
        ("swiglu_clip", {}, [9.0, -9.0], 7 / (1 + math.exp(-7.0)) * -7),
        ("swiglu_clip", {"limit": 2.0, "alpha": 1.702, "beta": 1.0}, [-3.0, 5.0], -3 / (1 + math.exp(5.106)) * 3),
        ("gelu", {}, [1.0], 0.8413447461),
        ("relu2", {}, [-3.0], 0.0),
        ("relu2", {}, [3.0], 9.0),
    ],
)
def test_activations_by_hand(name, parameters, fc1, expected):
    function = reference.activation_function((name, parameters))
    value = function(torch.tensor(fc1, dtype=torch.float64))
    assert value.tolist() == pytest.approx([expected], rel=1e-9)
    assert len(fc1) == (2 if reference.GATED[name] else 1)


def test_activations_and_gradients_are_finite_at_the_extremes():
    values = [0.0, -1e-30, 1e-30, -800.0, 800.0, -1e6, 1e6]
    for name in reference.ACTIVATIONS:
        x = torch.tensor([[v, 1.0] for v in values], dtype=torch.float64, requires_grad=True)
        y = reference.activation_function(name)(x)
        y.sum().backward()
        assert y.isfinite().all(), name
        assert x.grad.isfinite().all(), name


def test_rms_norm_is_the_definition():
    normed = reference.rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    assert normed.tolist() == pytest.approx([3 / math.sqrt(12.5), 2 * 4 / math.sqrt(12.5)])
    # the sum of these squares in bf16 would lose the small ones: the statistics are fp32
    x = torch.tensor([16.0] + [0.5] * 1023, dtype=torch.bfloat16)
    expected = (x.double() / (x.double() ** 2).mean().sqrt()).bfloat16()
    assert torch.equal(reference.rms_norm(x, torch.ones(1024, dtype=torch.bfloat16), 0.0), expected)


def test_rope_turns_the_first_part_of_the_head_only():
    x = torch.arange(1.0, 9.0, dtype=torch.float64).view(1, 1, 1, 8)
    turned = reference.rotate(x, torch.tensor([[3]]), rotary_dim=4, base=100.0).flatten()
    # pairs (0, 2) and (1, 3), angles 3 and 3 * 100^(-2/4) = 0.3: the rotary dim is the denominator, not the head
    for first, second, angle in ((0, 2, 3.0), (1, 3, 0.3)):
        a, b = first + 1, second + 1
        assert turned[first].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle))
        assert turned[second].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle))
    assert turned[4:].tolist() == [5.0, 6.0, 7.0, 8.0]


def test_rope_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(query_position: int, key_position: int) -> float:
        turned_q = reference.rotate(q, torch.tensor([[query_position]]), 4, 10000.0)
        return (turned_q * reference.rotate(k, torch.tensor([[key_position]]), 4, 10000.0)).sum().item()

    assert score(5, 2) == pytest.approx(score(13, 10), rel=1e-12)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-6)


def test_qkv_rows_are_interleaved_per_group():
    q, k, v = reference.split_qkv(torch.arange(16.0).view(1, 1, 16), heads=4, groups=2, head=2)
    assert q.tolist() == [[[[0, 1], [2, 3], [8, 9], [10, 11]]]]
    assert k.tolist() == [[[[4, 5], [12, 13]]]]
    assert v.tolist() == [[[[6, 7], [14, 15]]]]


def test_attention_equals_torchs():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 4, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, 5, 2, 8, dtype=torch.float64, generator=generator)
    ours = reference.softmax_attention(q, k, v, reference.visible(5, None))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_groups_are_chosen_by_the_sum_of_their_two_best():
    selection = torch.tensor([[0.9, 0.1, 0.2, 0.6, 0.5, 0.1, 0.55, 0.54, 0.0]])
    # sums of two: 1.1, 1.1, 1.09
    assert reference.choose_experts(selection, 2, 3, 2).tolist() == [[0, 3]]
    selection = torch.tensor([[0.9, 0.0, 0.0, 0.6, 0.5, 0.1, 0.55, 0.54, 0.0]])
    # sums of two: 0.9, 1.1, 1.09: expert 0 is the best, its group the worst
    assert reference.choose_experts(selection, 2, 3, 2).tolist() == [[3, 6]]
    assert reference.choose_experts(selection, 2, None, None).tolist() == [[0, 3]]


def test_routing_weights_are_normalised_then_scaled():
    scores = torch.tensor([[0.2, 0.6, 0.9]], dtype=torch.float64)
    weights = reference.routing_weights(scores, torch.tensor([[1, 0]]), 2.5)
    assert weights.tolist()[0] == pytest.approx([0.75 * 2.5, 0.25 * 2.5])
    assert reference.routing_weights(scores, torch.tensor([[2]]), 2.0).item() == pytest.approx(1.8)


def test_router_losses_by_hand():
    logits = torch.zeros(2, 3, 4, dtype=torch.float64)
    assert reference.z_loss_of(logits).item() == pytest.approx(math.log(4) ** 2)
    logits[..., 0] = logits[..., 1] = 40.0  # each token takes experts 0 and 1: f = P = 1/2 for both of them, nearly
    logits[..., 2] = logits[..., 3] = -40.0
    assert reference.balance_loss_of(logits, 2).item() == pytest.approx(4 * (0.5 * 0.5 + 0.5 * 0.5))
    logits[1] = logits[1].flip(-1)  # balanced over the batch, not within a sequence
    assert reference.balance_loss_of(logits, 2).item() == pytest.approx(2.0)


def test_a_token_sees_no_later_token():
    model, tokens = ReferenceModel(SIZES, random_weights()), random_tokens()
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    before, after = model.forward(tokens), model.forward(changed)
    torch.testing.assert_close(after.logits[:, :4], before.logits[:, :4])
    assert not torch.allclose(after.logits[:, 4:], before.logits[:, 4:])
    # MTP reads the next token, and only that one
    torch.testing.assert_close(after.mtp_logits[:, :3], before.mtp_logits[:, :3])
    assert not torch.allclose(after.mtp_logits[:, 3], before.mtp_logits[:, 3])


def test_documents_with_their_own_positions_are_as_if_alone():
    model, tokens = ReferenceModel(SIZES, random_weights()), random_tokens(batch=1)
    together = model.forward(
        tokens, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]), document_ids=torch.tensor([[0, 0, 1, 1, 1, 1]])
    )
    torch.testing.assert_close(together.logits[:, :2], model.forward(tokens[:, :2]).logits)
    torch.testing.assert_close(together.logits[:, 2:], model.forward(tokens[:, 2:]).logits)
    assert not torch.allclose(together.logits[:, 2:], model.forward(tokens).logits[:, 2:])


def test_losses_count_what_they_say():
    model, tokens = ReferenceModel(SIZES, random_weights()), random_tokens()
    labels = random_tokens(seed=2)
    output = model.forward(tokens, labels)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    expected = torch.nn.functional.cross_entropy(output.mtp_logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.mtp_loss, expected)
    z_loss, balance_loss = output.z_loss.sum(), output.balance_loss.sum()
    total = output.loss + 0.1 * output.mtp_loss + 0.01 * z_loss + 0.02 * balance_loss
    torch.testing.assert_close(output.total_loss, total)
    mask = torch.ones(labels.shape)
    mask[:, 2:] = 0
    expected = torch.nn.functional.cross_entropy(output.logits[:, :2].flatten(0, 1), labels[:, :2].flatten())
    torch.testing.assert_close(model.forward(tokens, labels, loss_mask=mask).loss, expected)


def test_shapes_and_gradients_of_the_whole_model():
    weights = random_weights()
    trained = {name: value.requires_grad_() for name, value in weights.items() if "expert_bias" not in name}
    output = ReferenceModel(SIZES, weights).forward(random_tokens(), random_tokens(seed=2))
    assert [tuple(hidden.shape) for hidden in output.hidden_per_layer] == [(2, 6, 16)] * 3
    assert [tuple(chosen.shape) for chosen in output.chosen_experts_per_layer] == [(2, 6, 4)] * 3  # MTP's is the last
    assert output.logits.dtype == torch.float64
    output.total_loss.backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in trained.values())


def test_the_expert_bias_moves_the_choice_and_not_the_weights():
    weights, tokens = random_weights(), random_tokens()
    for name in [name for name in weights if name.endswith("expert_bias")]:
        weights[name] = torch.zeros(8, dtype=torch.float64)
    plain = ReferenceModel(SIZES, weights).forward(tokens)
    weights["decoder.layers.2.mlp.router.expert_bias"] = torch.tensor([9.0, 9.0, 0, 0, 9.0, 9.0, 0, 0]).double()
    moved = ReferenceModel(SIZES, weights).forward(tokens)
    assert set(moved.chosen_experts_per_layer[1].flatten().tolist()) == {0, 1, 4, 5}
    for name in [name for name in weights if name.endswith("expert_bias")]:
        weights[name] = torch.full((8,), 0.7, dtype=torch.float64)  # the same for all: nothing changes
    torch.testing.assert_close(ReferenceModel(SIZES, weights).forward(tokens).logits, plain.logits)


def test_a_dense_model_with_other_activations():
    weights = {name: value for name, value in random_weights().items() if not name.startswith("mtp.")}
    dense = {name: value for name, value in weights.items() if ".layers.1" not in name and ".layers.2" not in name}
    dense["decoder.layers.0.mlp.linear_fc1.weight"] = weights["decoder.layers.0.mlp.linear_fc1.weight"][:FFN]
    sizes = ReferenceSizes(1, 16, 4, 2, 8, dense_activation="gelu")
    output = ReferenceModel(sizes, dense).forward(random_tokens(), random_tokens(seed=2))
    assert output.mtp_logits is None
    assert output.mtp_loss is None
    assert len(output.z_loss) == 0
    assert output.total_loss == output.loss
    own = ReferenceSizes(1, 16, 4, 2, 8, dense_activation=torch.nn.functional.gelu)
    torch.testing.assert_close(ReferenceModel(own, dense).forward(random_tokens()).logits, output.logits)
