"""Parameter and FLOP counts against published numbers and against sums done by hand."""

import math
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from ling.config.schema import ModelConfig
from ling.model.counts import count_parameters, flops_per_token, is_moe_layer, parameter_shapes

LING_2 = ModelConfig(
    kv_channels=128,
    vocab_size=157184,
    num_moe_experts=256,
    moe_router_topk=8,
    moe_router_num_groups=8,
    moe_router_group_topk=4,
)


def ling_2(hidden: int, layers: int, dense: int, heads: int, groups: int, ffn: int, **others) -> ModelConfig:
    """A model of the Ling 2.0 family: its experts, the one shared expert too, are a quarter of the hidden size wide."""
    return replace(
        LING_2,
        hidden_size=hidden,
        num_layers=layers,
        first_k_dense_replace=dense,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        moe_ffn_hidden_size=hidden // 4,
        moe_shared_expert_intermediate_size=hidden // 4,
        **others,
    )


def tiny(**changes) -> ModelConfig:
    """One dense layer, one MoE layer, an MTP layer; the vocabulary of 30 is padded to 32."""
    model = ModelConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=6,
        ffn_hidden_size=20,
        vocab_size=30,
        make_vocab_size_divisible_by=16,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=5,
        moe_shared_expert_intermediate_size=7,
        mtp_num_layers=1,
    )
    return replace(model, **changes)


ATTENTION = (4 + 2 * 2) * 6 * 8 + 4 * 6 * 8
NORMS = 8 + 8 + 6 + 6
DENSE_FFN = 3 * 20 * 8
EXPERT, SHARED, ROUTER = 3 * 5 * 8, 3 * 7 * 8, 4 * 8
DENSE_LAYER = ATTENTION + NORMS + DENSE_FFN
MOE_LAYER = ATTENTION + NORMS + ROUTER + 4 * EXPERT + SHARED
MOE_LAYER_ACTIVE = ATTENTION + NORMS + ROUTER + 2 * EXPERT + SHARED
MTP_EXTRA = 3 * 8 + 8 * 16


@pytest.mark.parametrize("mtp_num_layers", [0, 1])
@pytest.mark.parametrize(
    ("sizes", "total", "activated"),
    [
        ((2048, 20, 1, 16, 4, 5120), "16.256", "1.433"),  # Ling-mini-2.0
        ((4096, 32, 1, 32, 4, 9216), "102.89", "6.15"),  # Ling-flash-2.0
        ((8192, 80, 4, 64, 8, 18432), "999.705", "51.1"),  # Ling-1T
        ((1536, 17, 1, 12, 4, 4096), "7.891", "0.87"),  # 7.9B, derived
        ((3584, 50, 1, 28, 4, 8192), "124.05", "6.98"),  # 124B, derived
    ],
)
def test_published_totals_to_the_printed_digits(sizes, total, activated, mtp_num_layers):
    count = count_parameters(ling_2(*sizes, mtp_num_layers=mtp_num_layers))
    assert _billions(count.total_without_mtp, total) == total
    assert _billions(count.activated, activated) == activated
    assert (count.total == count.total_without_mtp) == (mtp_num_layers == 0)


def _billions(number: int, like: str) -> str:
    return f"{number / 1e9:.{len(like.split('.')[1])}f}"


def test_tiny_model_by_hand():
    count = count_parameters(tiny())
    assert count.total == 2 * 32 * 8 + DENSE_LAYER + MOE_LAYER + 8 + MOE_LAYER + MTP_EXTRA
    assert count.activated == 2 * 32 * 8 + DENSE_LAYER + MOE_LAYER_ACTIVE + 8
    assert count.embedding == 2 * 32 * 8
    assert [(layer.name, layer.total, layer.activated) for layer in count.per_layer] == [
        ("decoder.layers.0", DENSE_LAYER, DENSE_LAYER),
        ("decoder.layers.1", MOE_LAYER, MOE_LAYER_ACTIVE),
        ("mtp.layers.0", MOE_LAYER + MTP_EXTRA, MOE_LAYER_ACTIVE + MTP_EXTRA),
    ]
    assert asdict(count.components) == {
        "embedding": 32 * 8,
        "attention": 2 * ATTENTION,
        "dense_ffn": DENSE_FFN,
        "router": ROUTER,
        "routed_experts": 4 * EXPERT,
        "shared_experts": SHARED,
        "norms": 2 * NORMS + 8,
        "output": 32 * 8,
        "mtp": MOE_LAYER + MTP_EXTRA,
        "scalars": 0,
    }


def test_a_dense_model_has_a_dense_mtp_layer():
    count = count_parameters(tiny(num_moe_experts=None, moe_ffn_hidden_size=None))
    assert count.per_layer[-1].total == DENSE_LAYER + MTP_EXTRA
    assert count.activated == count.total_without_mtp == 2 * 32 * 8 + 2 * DENSE_LAYER + 8


def test_options_that_change_the_structure():
    total = count_parameters(tiny()).total
    assert count_parameters(tiny(qk_layernorm=False)).total == total - 3 * (6 + 6)
    assert count_parameters(tiny(moe_shared_expert_intermediate_size=None)).total == total - 2 * SHARED
    assert count_parameters(tiny(num_query_groups=None)).total == total + 3 * (2 * 2) * 6 * 8
    assert count_parameters(tiny(first_k_dense_replace=0)).total == total - DENSE_LAYER + MOE_LAYER
    # without a gate there is one projection less, each kind of FFN on its own
    assert count_parameters(tiny(dense_activation="gelu")).total == total - DENSE_FFN // 3
    assert count_parameters(tiny(shared_activation="relu2")).total == total - 2 * SHARED // 3
    assert count_parameters(tiny(routed_activation={"name": "relu2"})).total == total - 2 * 4 * EXPERT // 3
    kinds = {"dense_activation": "swiglu", "shared_activation": "swiglu", "routed_activation": "swiglu"}
    assert count_parameters(tiny(activation="gelu", **kinds)).total == total
    assert count_parameters(tiny(activation={"name": "powlu", "m": 2.0})).total == total


def test_shapes_are_those_of_the_count_and_of_the_layer_kinds():
    model = tiny()
    shapes = parameter_shapes(model)
    assert sum(math.prod(shape) for shape in shapes.values()) == count_parameters(model).total
    assert shapes["mtp.layers.0.transformer_layer.mlp.experts.weight1"] == (4, 2 * 5, 8)
    assert shapes["decoder.layers.0.mlp.linear_fc1.weight"] == (2 * 20, 8)
    assert [is_moe_layer(model, layer) for layer in range(2)] == [False, True]


def test_missing_expert_width_is_named():
    with pytest.raises(ValueError, match="moe_ffn_hidden_size"):
        count_parameters(tiny(moe_ffn_hidden_size=None))


def test_flops_of_the_tiny_model_by_hand():
    flops = flops_per_token(tiny(), 10, training=False)
    matrices = 2 * ATTENTION + DENSE_FFN + ROUTER + 2 * EXPERT + SHARED
    attention = 2 * 2 * (10 / 2) * 4 * 6  # scores and values, 4 heads of 6 channels, 5 keys on average
    head = 2 * 32 * 8
    assert flops.matmul == 2 * matrices
    assert flops.attention == 2 * attention
    assert flops.head == head
    assert flops.mtp == 2 * (ATTENTION + ROUTER + 2 * EXPERT + SHARED + 8 * 16) + attention + head
    assert flops.total == flops.matmul + flops.attention + flops.head + flops.mtp
    training = flops_per_token(tiny(), 10)
    assert asdict(training) == {name: 3 * value for name, value in asdict(flops).items()}
    assert flops_per_token(tiny(mtp_num_layers=0), 10).mtp == 0


def test_training_flops_are_about_six_per_activated_parameter():
    model = ling_2(2048, 20, 1, 16, 4, 5120)
    flops, count = flops_per_token(model, 4096), count_parameters(model)
    vectors = count.components.norms
    assert flops.matmul + flops.head == 6 * (count.activated - count.components.embedding - vectors)
    assert 0.1 < flops.attention / flops.total < 0.3


def test_counting_does_not_import_torch():
    code = "import sys, ling.model.counts; print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
