"""The Python code of an export in transformers: the numbers of the plain reference, cache, generation, training."""

import copy
import os
from dataclasses import replace

import pytest
import torch

from ling.config.schema import ModelConfig
from ling.hf.export import Options, export
from ling.hf.names import place_of, stacks_layers
from ling.model.counts import parameter_shapes
from tests.hf.directories import DENSE, MOE, draw, make_checkpoint, needs_transformers
from tests.model.reference import ReferenceModel
from tests.model.test_model import sizes_of

pytestmark = needs_transformers
TOLERANCE = 3e-5
MODELS = {
    "powlu": MOE,
    "swiglu": replace(MOE, activation="swiglu"),
    "dense": DENSE,
    "ungated": replace(MOE, activation="relu2"),
    "per kind": replace(
        MOE, activation="gelu", routed_activation={"name": "powlu", "m": 2.0}, dense_activation="swiglu"
    ),
    "clipped": replace(MOE, activation={"name": "swiglu_clip", "limit": 0.5}),
    "no groups, no MTP": replace(MOE, moe_router_num_groups=None, moe_router_group_topk=None, mtp_num_layers=0),
    "no shared experts, bias and norm on heads": replace(
        MOE, moe_shared_expert_intermediate_size=None, moe_router_enable_expert_bias=False, qk_layernorm=False
    ),
    "one expert a token": replace(MOE, moe_router_topk=1, moe_router_topk_scaling_factor=1.0),
    "whole rotary": replace(MOE, rotary_percent=1.0, rotary_base=5e5, layernorm_epsilon=1e-3),
}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """transformers copies the code of a directory into its cache: one of our own."""
    before = dict(os.environ)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    yield
    os.environ.clear()
    os.environ.update(before)


def directory(folder, model: ModelConfig, dtype=torch.float32, **options):
    export(make_checkpoint(folder / "checkpoint", model, dtype=dtype), folder / "hf", Options(**options))
    return folder / "hf"


def load(folder, dtype=torch.float32, **settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=dtype, **settings).eval()


def reference(model: ModelConfig, tokens: torch.Tensor, dtype=torch.float64):
    """The plain reference in float64, with the tensors that `draw` gives."""
    stored = draw(model)
    places = {name: place_of(name, stacks_layers(model)) for name in parameter_shapes(model)}
    weights = {name: stored[key] if layer is None else stored[key][layer] for name, (key, layer) in places.items()}
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    weights |= {name: value.to(dtype) for name, value in stored.items() if name.endswith("expert_bias")}
    return ReferenceModel(sizes_of(model), weights).forward(tokens)


def some_tokens(rows=2, length=24):
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_of_the_reference(tmp_path, name, attention):
    model, tokens = MODELS[name], some_tokens()
    output = load(directory(tmp_path, model), attn_implementation=attention)(tokens, output_mtp_logits=True)
    truth = reference(model, tokens)
    scale = max(1.0, float(truth.logits.square().mean().sqrt()))
    assert float((output.logits - truth.logits).abs().max()) < TOLERANCE * scale
    assert (output.mtp_logits is not None) == bool(model.mtp_num_layers)
    if model.mtp_num_layers:
        (mtp_logits,) = output.mtp_logits
        assert float((mtp_logits - truth.mtp_logits).abs().max()) < TOLERANCE * scale


@pytest.fixture(scope="module")
def powlu(tmp_path_factory):
    return directory(tmp_path_factory.mktemp("powlu"), MOE)


@pytest.fixture(scope="module")
def model(powlu):
    return load(powlu)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # before transformers 5.24, and since
@torch.no_grad()
def test_cache(powlu, name, attention):
    from transformers import DynamicCache

    model, tokens, cache = load(powlu, attn_implementation=attention), some_tokens(), DynamicCache()
    pieces = [tokens[:, :10], tokens[:, 10:20], *tokens[:, 20:].split(1, dim=1)]
    outputs = [model(piece, use_cache=True, **{name: cache}) for piece in pieces]
    found = torch.cat([output.logits for output in outputs], dim=1)
    torch.testing.assert_close(found, model(tokens).logits, atol=1e-5, rtol=0)
    assert outputs[-1].past_key_values is cache
    assert model(tokens[:, :10]).past_key_values.get_seq_length() == 10
    assert model(tokens, use_cache=False).past_key_values is None
    with pytest.raises(ValueError, match="whole sequences"):
        model(tokens[:, :1], output_mtp_logits=True, **{name: cache})
    with pytest.raises(ValueError, match="which are the same"):
        model(tokens[:, :1], past_key_values=cache, cache=cache)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model):
    tokens = some_tokens()
    mask = torch.ones(2, 27, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([torch.full((2, 3), 2), tokens], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, model(tokens).logits, atol=1e-5, rtol=0)
    alone = model(padded, attention_mask=mask).logits  # RoPE sees differences of positions alone
    torch.testing.assert_close(alone[:, 3:], model(tokens).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_generate(model):
    tokens = some_tokens()
    mask = torch.ones_like(tokens)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = model.generate(tokens, **settings)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(found, model.generate(tokens, **settings, **other)), other
    expected = tokens
    for _ in range(8):
        logits = reference(MOE, expected).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_bf16_keeps_the_router_bias_in_fp32(powlu):
    model = load(powlu, torch.bfloat16)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("expert_bias")}
    assert len(biases) == 4
    assert {tensor.dtype for tensor in biases.values()} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in biases} == {torch.bfloat16}
    stored = draw(MOE)["decoder.layers.1.mlp.router.expert_bias"]
    assert torch.equal(biases["model.layers.1.mlp.gate.expert_bias"], stored)
    tokens = some_tokens()
    truth = reference(MOE, tokens).logits
    error = (model(tokens).logits.double() - truth).norm(dim=-1).median()  # a token may be routed elsewhere
    assert error < 0.05 * truth.norm(dim=-1).median()


def test_gradient_checkpointing(powlu):
    tokens = some_tokens()
    gradients = []
    for checkpointing in (False, True):
        model = load(powlu).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        output = model(tokens, labels=tokens)
        output.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    assert any(".layers.4." in name for name in gradients[0])  # the MTP layer learns, too
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@torch.no_grad()
def test_loss(model):
    tokens = some_tokens()
    labels = tokens.clone()
    labels[0, :5] = -100
    logits = reference(MOE, tokens).logits
    truth = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert model(tokens, labels=labels).loss == pytest.approx(float(truth), rel=1e-5)


@torch.no_grad()
def test_saved_again_it_is_the_same(model, tmp_path):
    """transformers 5 moves keys of RoPE when it saves; that must not matter."""
    tokens = some_tokens()
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    # not to the bit: where a tensor begins in memory may choose another product of matrices
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_outputs_on_request(powlu):
    model, tokens = load(powlu, attn_implementation="eager"), some_tokens()
    output = model(tokens, output_hidden_states=True, output_attentions=True, logits_to_keep=1)
    assert len(output.hidden_states) == MOE.num_layers + 1
    assert [x.shape for x in output.attentions] == [(2, 4, 24, 24)] * MOE.num_layers
    assert output.logits.shape == (2, 1, 320 if MOE.make_vocab_size_divisible_by == 64 else 384)
    torch.testing.assert_close(output.logits, model(tokens).logits[:, -1:])
    embedded = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(tokens).logits)
    assert isinstance(model(tokens, return_dict=False), tuple)
    with pytest.raises(ValueError, match="whole sequences"):
        model(inputs_embeds=embedded, output_mtp_logits=True)


def test_an_unknown_activation_stops(powlu):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = copy.deepcopy(AutoConfig.from_pretrained(powlu, trust_remote_code=True))
    config.hidden_act = "swish9"
    with pytest.raises(ValueError, match="swish9"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def test_tokenizer(powlu):
    from transformers import AutoTokenizer

    from ling.data.tokenizer import load_tokenizer

    theirs, ours = AutoTokenizer.from_pretrained(powlu, trust_remote_code=True), load_tokenizer(powlu)
    text = "hello  world\n alpha42"
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
