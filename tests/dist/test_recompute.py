"""Recomputation changes the memory, not a bit of the result; stages of unequal length change only the rounding."""

from dataclasses import replace

import pytest
import torch

from tests.dist.ranks import Ranks
from tests.dist.training import DENSE, MOE, batch_of, build_single, tiny_config, train_losses
from tests.dist.training import SyntheticStream as Stream

SELECTIVE = ["core_attn", "layernorm", "activation", "moe", "shared_experts", "mlp"]
WAYS = {
    "full": {"recompute_granularity": "full"},
    **{name: {"recompute_granularity": "selective", "recompute_modules": [name]} for name in SELECTIVE},
    "several": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm", "activation"],
    },
}
KEEPS_LESS = ("full", "core_attn", "moe", "shared_experts", "mlp")


def loss_and_gradients(model, **runtime) -> tuple[dict[str, torch.Tensor], int]:
    """Losses, gradients and expert loads of one batch, and how many bytes the graph keeps until the backward pass."""
    built = build_single(tiny_config(model=model, runtime=runtime)).train()
    batch = batch_of(Stream(), 0, 2)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = built(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    losses.sum().backward()
    values = {f"gradient of {name}": param.grad for name, param in built.named_parameters()}
    values |= dict(built.named_buffers()) | {"losses": losses.detach()}
    return values, sum(kept.values())


@pytest.mark.ranks(1)
@pytest.mark.parametrize("way", WAYS)
def test_recomputation_is_exact(way):
    plain, kept_plain = loss_and_gradients(MOE)
    again, kept_again = loss_and_gradients(MOE, **WAYS[way])
    different = [name for name in plain if not torch.equal(plain[name], again[name])]
    assert different == []
    if way in KEEPS_LESS:
        assert kept_again < kept_plain


@pytest.mark.ranks(1)
@pytest.mark.parametrize("model", ["moe", "dense"])
def test_a_recomputed_activation_is_not_kept(model):
    """fc2's input is given up after its use and made again for the backward pass."""
    from ling.model.mlp import activate_and_project

    built = build_single(
        tiny_config(
            model=MOE if model == "moe" else DENSE,
            runtime={"recompute_granularity": "selective", "recompute_modules": ["activation"]},
        )
    )
    mlp = built.decoder.layers[0].mlp
    seen = []

    def project(activated: torch.Tensor) -> torch.Tensor:
        seen.append(activated)
        return activated * 2.0

    hidden = torch.randn(4, 2, 2 * mlp.config.ffn_hidden_size, requires_grad=True)
    output = activate_and_project(mlp.config, mlp.activation, project, hidden, None)
    assert seen[0].untyped_storage().nbytes() == 0
    output.sum().backward()
    expected = hidden.detach().clone().requires_grad_()
    (mlp.activation(expected) * 2.0).sum().backward()
    assert torch.equal(hidden.grad, expected.grad)


@pytest.mark.parametrize(
    ("virtual", "counts"), [(None, [1, 3]), (None, [3, 1]), (2, [1, 1, 1, 2])], ids=["short first", "long first", "VPP"]
)
def test_stages_of_unequal_length(ranks: Ranks, virtual, counts):
    model = replace(MOE, activation="swiglu", num_layers=sum(counts))
    (single,) = ranks.run(1, train_losses, tiny_config(1, model, train={"micro_batch_size": 1}), 4)
    parallel = {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": virtual,
        "num_layers_per_stage": counts,
    }
    config = tiny_config(2, model, parallel=parallel, train={"micro_batch_size": 1})
    for outcome in ranks.run(2, train_losses, config, 4):
        assert outcome.losses == pytest.approx(single.losses, rel=1e-5)
        assert outcome.mtp_losses == pytest.approx(single.mtp_losses, rel=1e-5)
        assert outcome.grad_norms == pytest.approx(single.grad_norms, rel=1e-4)
