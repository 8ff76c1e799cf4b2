"""config.json: everything that a model is comes back from it, and what it cannot say is refused."""

from dataclasses import replace

import pytest

from ling.activations.table import ACTIVATIONS
from ling.config.derived import padded_vocab_size
from ling.config.errors import UserError
from ling.hf.config import hf_config, hidden_act, model_config
from ling.model.counts import count_parameters
from tests.activations.specs import spec
from tests.hf.directories import DENSE, MOE

TOKENS = {"bos": 1, "eos": 2, "pad": 2}
# The config.json of Ling-mini-2.0, as published, but for keys that say nothing of the model.
LING_MINI = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "max_position_embeddings": 32768,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 512,
    "n_group": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "vocab_size": 157184,
}


def back_and_forth(model):
    config = hf_config(model, "bfloat16", TOKENS)
    again = model_config(config, "config.json")
    assert hf_config(again, "bfloat16", TOKENS) == config
    return again


@pytest.mark.parametrize("model", [MOE, DENSE, replace(MOE, moe_router_num_groups=None, moe_router_group_topk=None)])
def test_a_model_comes_back(model):
    again = back_and_forth(model)
    assert count_parameters(again).components == count_parameters(model).components
    assert again.vocab_size == padded_vocab_size(model)  # the rows of the embedding, whatever they were padded from


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_comes_back(name):
    again = back_and_forth(replace(MOE, activation=spec(name)))
    assert again.activation["name"] == name


def test_activations_of_their_own_per_kind_and_layer():
    limits = [0.0, 5.0, 7.0, 0.0]
    routed = {"name": "swiglu_clip_post", "limit": limits}
    model = replace(MOE, activation="swiglu", routed_activation=routed, shared_activation={"name": "powlu", "m": 2.0})
    config = hf_config(model, "float32", TOKENS)
    assert config["hidden_act"] == "mixed"
    assert config["dense_hidden_act"] == "silu"
    assert config["shared_powlu_m"] == 2.0
    again = back_and_forth(model)
    assert again.routed_activation["limit"] == [None, 5.0, 7.0, None] or again.routed_activation["limit"] == limits
    assert again.shared_activation["m"] == 2.0


def test_names_that_stock_code_reads_mean_what_it_thinks():
    assert hidden_act(ACTIVATIONS["swiglu"]) == "silu"
    stock = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "relu": "reglu"}
    for row in ACTIVATIONS.values():
        if not row.gated:
            assert hidden_act(row).startswith("ungated_")
        elif hidden_act(row) in stock:
            assert row.name == stock[hidden_act(row)]
    assert len({hidden_act(row) for row in ACTIVATIONS.values()}) == len(ACTIVATIONS)


def test_the_published_config():
    model = model_config(LING_MINI, "config.json")
    assert round(count_parameters(model).total_without_mtp / 1e9, 2) == 16.26
    assert model.rotary_percent == 0.5
    written = hf_config(model, "bfloat16", TOKENS)
    assert {key: written[key] for key in LING_MINI} == LING_MINI


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"use_qkv_bias": True}, "use_qkv_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"score_function": "softmax"}, "score_function"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_act": "swish9"}, "swish9"),
        ({"hidden_act": "mixed"}, "mixed"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"partial_rotary_factor": None}, "rotary_dim"),
    ],
)
def test_another_architecture_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        model_config(LING_MINI | change, "config.json")


def test_what_the_form_cannot_say_is_refused():
    hf_config(replace(MOE, mcore={"tp_comm_overlap": True}), "float32", TOKENS)
    with pytest.raises(UserError, match="model.mcore.rotary_interleaved"):
        hf_config(replace(MOE, mcore={"rotary_interleaved": True}), "float32", TOKENS)
