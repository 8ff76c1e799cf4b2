"""What an FFN keeps for the backward pass: fc1's output and the router weight; fc2's input unless it is recomputed."""

from dataclasses import replace

import pytest
import torch

from tests.dist.training import DENSE, MOE, build_single, tiny_config

pytestmark = pytest.mark.ranks(1)

ROWS = 128  # of each of two experts: a multiple of what the CPU pads to
WIDTH = {"dense": 80, "routed": 48}  # neither twice nor once the hidden size


def kept(run) -> dict[str, list[torch.Tensor]]:
    """Activations that autograd holds after a forward pass, by shape; each storage once, none that was given back."""
    held: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr() or id(tensor.untyped_storage())] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run()
    shapes: dict[str, list[torch.Tensor]] = {}
    for tensor in held.values():
        if tensor.untyped_storage().nbytes() and not isinstance(tensor, torch.nn.Parameter):
            rows = tensor.shape[:-1].numel() if tensor.dim() > 1 else 1
            shapes.setdefault(f"{rows}x{tensor.shape[-1]}", []).append(tensor)
    output.sum().backward()
    return shapes


def ffn(kind: str, kernels: str, recompute: bool):
    """One FFN of the kind, and a call of it that gives its output."""
    runtime = {"kernels": kernels}
    if recompute:
        runtime |= {"recompute_granularity": "selective", "recompute_modules": ["activation"]}
    sizes = {"ffn_hidden_size": 80} if kind == "dense" else {"moe_ffn_hidden_size": 48}
    model = replace(DENSE if kind == "dense" else MOE, num_layers=2, **sizes)
    model = build_single(tiny_config(model=model, runtime=runtime))
    mlp = model.decoder.layers[1].mlp
    hidden = torch.randn(2 * ROWS, 1, model.config.hidden_size, requires_grad=True)
    if kind == "dense":
        return lambda: mlp(hidden)[0]
    experts, tokens = mlp.experts, torch.zeros(MOE.num_moe_experts, dtype=torch.long)
    tokens[[1, 4]] = ROWS
    weight = torch.rand(2 * ROWS, requires_grad=True)
    return lambda: experts(hidden[:, 0], tokens, weight)[0]


@pytest.mark.parametrize("kernels", ["fused", "reference"])
@pytest.mark.parametrize("kind", WIDTH)
def test_kept_activations(kind, kernels):
    width = WIDTH[kind]
    fc1, fc2 = f"{2 * ROWS}x{2 * width}", f"{2 * ROWS}x{width}"
    plain, lean = (kept(ffn(kind, kernels, recompute)) for recompute in (False, True))
    assert len(plain[fc1]) == len(lean[fc1]) == 1
    # everything of the FFN's width that is kept is what fc2 multiplies
    assert len(plain[fc2]) == 1
    assert fc2 not in lean
    assert {name: len(found) for name, found in plain.items() if name != fc2} == {
        name: len(found) for name, found in lean.items()
    }
