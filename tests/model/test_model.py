"""The model on megatron-core against the plain PyTorch one, in values, choices, losses and all gradients.

Truth is the reference in float64. How far fp32 may be from it says the reference run in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from ling.config.derived import activation_for
from ling.config.schema import ModelConfig
from ling.model.build import LingModel
from ling.model.init import global_names
from ling.model.router import routers
from ling.platform import megatron
from tests.dist.training import (
    DENSE,
    MOE,
    SyntheticStream,
    bare_chunks,
    batch_of,
    batches_of,
    build_single,
    build_trainer,
    global_state,
    tiny_config,
)
from tests.model.reference import ReferenceModel, ReferenceOutput, ReferenceSizes

pytestmark = pytest.mark.ranks(1)

MODEL = replace(MOE, num_layers=3)
DENSE_MODEL = replace(DENSE, num_layers=3)
MIXED = {
    "dense_activation": "gelu",
    "shared_activation": {"name": "swiglu_clip", "limit": 0.5, "alpha": 1.702, "beta": 1.0},
    "routed_activation": {"name": "powlu", "m": 2.0},
}
NO_GROUPS = {"moe_router_num_groups": None, "moe_router_group_topk": None}
CASES: dict[str, ModelConfig] = {
    **{name: replace(MODEL, activation=name) for name in ("powlu", "swiglu", "gelu", "relu2")},
    "swiglu_clip": replace(MODEL, activation={"name": "swiglu_clip", "limit": 0.5}),
    "an activation of its own for each kind": replace(MODEL, **MIXED),
    "dense": DENSE_MODEL,
    "dense, other heads and rotation": replace(
        DENSE_MODEL, num_query_groups=None, rotary_percent=1.0, rotary_base=600.0, qk_layernorm=False
    ),
    "no groups": replace(MODEL, moe_router_topk=3, **NO_GROUPS),
    "top-1": replace(MODEL, moe_router_topk=1, **NO_GROUPS),
    "top-1 of two groups": replace(MODEL, moe_router_topk=1),
    "only experts": replace(MODEL, moe_shared_expert_intermediate_size=None, first_k_dense_replace=0),
    "no bias, no MTP": replace(MODEL, moe_router_enable_expert_bias=False, mtp_num_layers=0),
}


class Documents(SyntheticStream):
    """Samples of two or three documents; the token after an end counts for no loss."""

    def sample(self, i: int) -> dict[str, np.ndarray]:
        sample = super().sample(i)
        ends = np.zeros(self.length, dtype=bool)
        ends[[3 + i, 20]] = True
        sample["document_ids"] = np.cumsum(ends) - ends
        sample["loss_mask"][ends] = 0.0
        return sample


@torch.no_grad()
def draw_weights(chunk: LingModel) -> None:
    """Weights that matter more than the initial ones: matrices that keep the size, uneven norms, a biased router."""
    generator = torch.Generator().manual_seed(5)
    for param in chunk.parameters():
        noise = torch.randn(param.shape, generator=generator)
        param.copy_(1 + 0.1 * noise if param.dim() == 1 else 0.7 * noise / param.shape[-1] ** 0.5)
    for router in routers([chunk]):
        if router.has_bias:
            router.expert_bias.copy_(0.1 * torch.randn(router.expert_bias.shape, generator=generator))


def sizes_of(model: ModelConfig) -> ReferenceSizes:
    """The reference's sizes of a config."""
    shared = {entry.name for entry in fields(ReferenceSizes)} & {entry.name for entry in fields(ModelConfig)}
    sizes = {name: getattr(model, name) for name in shared}
    sizes["num_query_groups"] = model.num_query_groups or model.num_attention_heads
    for kind in ("dense", "shared", "routed"):
        spec = dict(activation_for(model, kind))
        sizes[f"{kind}_activation"] = (spec.pop("name"), spec)
    return ReferenceSizes(**sizes)


@dataclass
class Exact:
    """The reference's output on a batch and the gradients of its training loss."""

    output: ReferenceOutput
    grads: dict[str, torch.Tensor]


def run_reference(model: ModelConfig, state: tuple[Any, Any], batch: dict[str, torch.Tensor], dtype: torch.dtype):
    """The reference with a chunk's weights, in a dtype of its own."""
    weights = {name: value.to(dtype).requires_grad_() for name, value in state[0].items()}
    reference = ReferenceModel(sizes_of(model), weights | {name: bias.to(dtype) for name, bias in state[1].items()})
    with torch.enable_grad():
        output = reference.forward(
            batch["tokens"], batch["labels"], batch["position_ids"], batch.get("document_ids"), batch["loss_mask"]
        )
        total = output.total_loss + (mtp_share(batch) - 1) * model.mtp_loss_scaling_factor * (output.mtp_loss or 0)
        total.backward()
    return Exact(output, {name: value.grad for name, value in weights.items()})


def mtp_share(batch: dict[str, torch.Tensor]) -> float:
    """megatron-core 0.16 divides the MTP loss by the tokens of the main loss, of which there are more."""
    if megatron.version() >= (0, 19):
        return 1.0
    return float(batch["loss_mask"][:, 1:].sum() / batch["loss_mask"].sum())


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative to the size of the whole tensor."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def check_close(what: str, ours: Any, eager: Any, truth: Any) -> None:
    """No farther from float64 than plain PyTorch in the same dtype is, within a factor and a rounding."""
    tensors = [torch.as_tensor(value).detach() for value in (ours, eager, truth)]
    mine, yardstick = error(tensors[0], tensors[2]), error(tensors[1], tensors[2])
    assert mine <= 4 * yardstick + 2e-7, f"{what}: {mine:.1e}, plain PyTorch {yardstick:.1e}"


def check_step(model: ModelConfig, stream: SyntheticStream, micro_batch_size: int = 2) -> None:
    """A training step: losses and every gradient."""
    train = {"micro_batch_size": micro_batch_size}
    trainer = build_trainer(tiny_config(model=model, optim={"clip_grad": 0.0}, train=train), train_stream=stream)
    (chunk,) = bare_chunks(trainer)
    draw_weights(chunk)
    state, batch = global_state(chunk), batch_of(stream, 0, 4)
    truth, eager = (run_reference(model, state, batch, dtype) for dtype in (torch.float64, torch.float32))
    record = trainer.train_step(batches_of(trainer))
    check_close("loss", record["loss"], eager.output.loss, truth.output.loss)
    if model.mtp_num_layers:
        check_close("mtp_loss", record["mtp_loss"], eager.output.mtp_loss, truth.output.mtp_loss)
    names = global_names(chunk)
    for name, param in chunk.named_parameters():
        check_close(name, param.main_grad, eager.grads[names[name]], truth.grads[names[name]])
    norm = torch.stack([grad.norm() for grad in truth.grads.values()]).norm()
    assert record["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients(name):
    check_step(CASES[name], SyntheticStream())


def test_losses_and_gradients_within_documents():
    check_step(replace(MODEL, moe_z_loss_coeff=0.0, moe_aux_loss_coeff=0.0), Documents(), micro_batch_size=4)


def test_router_losses_reach_the_gradient():
    """The step's check would pass without them if they were too small to be seen."""
    chunk = build_single(tiny_config(model=MODEL))
    draw_weights(chunk)
    state, batch = global_state(chunk), batch_of(SyntheticStream(), 0, 4)
    name = "decoder.layers.1.mlp.router.weight"
    full = run_reference(MODEL, state, batch, torch.float64).grads[name]
    for coefficient in ("moe_z_loss_coeff", "moe_aux_loss_coeff"):
        without = run_reference(replace(MODEL, **{coefficient: 0.0}), state, batch, torch.float64).grads[name]
        assert error(without, full) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["powlu", "dense", "no groups", "top-1 of two groups"])
def test_logits_and_chosen_experts(name):
    model, batch = CASES[name], batch_of(SyntheticStream(), 0, 2)
    chunk = build_single(tiny_config(model=model)).eval()
    draw_weights(chunk)
    for router in routers([chunk]):
        router.record_choice = True
    truth, eager = (run_reference(model, global_state(chunk), batch, d).output for d in (torch.float64, torch.float32))
    logits = chunk(batch["tokens"], batch["position_ids"], None)
    check_close("logits", logits, eager.logits, truth.logits)
    losses = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    per_token = torch.nn.functional.cross_entropy(truth.logits.transpose(1, 2), batch["labels"], reduction="none")
    assert error(losses, per_token) < 1e-6
    choices = [router.last_choice.view(32, 2, -1).transpose(0, 1) for router in routers([chunk])]
    assert len(choices) == len(truth.chosen_experts_per_layer) == (0 if model.num_moe_experts is None else 3)
    for ours, theirs in zip(choices, truth.chosen_experts_per_layer, strict=True):
        assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
        assert len(theirs.unique()) > 4  # not always the same experts


@torch.no_grad()
def test_documents_do_not_see_each_other():
    from ling.model.attention import document_mask

    chunk = build_single(tiny_config(model=MODEL)).eval()
    draw_weights(chunk)
    batch = batch_of(Documents(), 0, 2)
    mask = document_mask(batch["document_ids"])
    before = chunk(batch["tokens"], batch["position_ids"], mask)
    changed = batch["tokens"].clone()
    changed[:, 22] = (changed[:, 22] + 1) % 250  # in the last document, which begins at 21
    after = chunk(changed, batch["position_ids"], mask)
    assert torch.equal(before[:, :22], after[:, :22])
    assert not torch.equal(before[:, 22:], after[:, 22:])
    changed = batch["tokens"].clone()
    changed[:, :21] = (changed[:, :21] + 1) % 250
    assert error(chunk(changed, batch["position_ids"], mask)[:, 21:], before[:, 21:]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["powlu", "dense"])
def test_bf16_is_as_near_as_plain_bf16(name):
    model, batch = CASES[name], batch_of(SyntheticStream(), 0, 2)
    chunk = build_single(tiny_config(model=model, precision={"recipe": "bf16"})).eval()
    draw_weights(chunk)
    assert {param.dtype for param in chunk.parameters()} == {torch.bfloat16}
    state = global_state(chunk)
    truth, eager = (run_reference(model, state, batch, d).output.logits for d in (torch.float64, torch.bfloat16))
    logits = chunk(batch["tokens"], batch["position_ids"], None)
    # by token, and of those the median: a token that is routed elsewhere is far off, in both
    ours, yardstick = ((x.double() - truth).norm(dim=-1).median() for x in (logits, eager))
    assert 0 < ours <= 2 * yardstick
    assert ours / truth.norm(dim=-1).median() < 0.03
