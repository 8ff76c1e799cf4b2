"""The model in Transformer Engine's layers: the same weights under the same names; on a GPU the same function.

Building needs no GPU, only that Transformer Engine can be imported; its layers ask for one, which is feigned here.
"""

from unittest import mock

import pytest
import torch

from ling.platform import optional
from tests.dist.training import DENSE, MOE, SyntheticStream, batch_of, tiny_config

PROBLEM = optional.find("transformer_engine").problem
pytestmark = [
    pytest.mark.ranks(1),
    pytest.mark.skipif(PROBLEM is not None, reason=f"transformer_engine: {PROBLEM}"),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MODELS = {"moe": MOE, "dense": DENSE}


def build(model: str, backend: str, device: str = "cpu", recipe: str = "fp32"):
    from ling.model.build import build_model
    from ling.parallel import groups

    config = tiny_config(model=MODELS[model], precision={"recipe": recipe})
    groups.build_groups(config.parallel)
    groups.seed_random_states(config.run.seed)
    experts = "te" if backend == "te" else "grouped_mm"
    operations = {"attention": "sdpa", "experts": experts, "linear": backend, "activation": "reference"}
    feigned = mock.patch("torch.cuda.is_available", return_value=True)
    with feigned:
        (chunk,) = build_model(config, torch.device(device), bf16=recipe != "fp32", operations=operations)
    return chunk


def checkpointed(model) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    """What a checkpoint would hold: rows of the global tensors by key and offset."""
    from ling.parallel import groups

    parts = {}
    metadata = {"singleton_local_shards": False, "dp_cp_group": groups.data_with_context()}
    for value in model.sharded_state_dict(metadata=metadata).values():
        built = value.build() if hasattr(value, "build") else value
        for part in built if isinstance(built, list) else [built]:
            rows = part.data if part.data.dim() == part.prepend_axis_num + len(part.global_shape) else part.data[None]
            if "experts.experts" not in part.key:
                parts[(part.key, part.global_shape, part.global_offset)] = part.data
                continue
            for row, matrix in enumerate(rows.reshape(-1, *rows.shape[-2:])):
                first, *offset = part.global_offset
                parts[(part.key, part.global_shape, (first + row, *offset))] = matrix
    return parts


@pytest.mark.parametrize("model", MODELS)
def test_same_checkpoint_as_with_torch(model):
    ours, theirs = (checkpointed(build(model, backend)) for backend in ("torch", "te"))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_marked_as_split_and_load(model):
    from ling.model.init import global_names

    built = build(model, "te")
    marked = [param for name, param in built.named_parameters() if param.dim() > 1 and "router" not in name]
    split = [param for param in marked if getattr(param, "tensor_model_parallel", False)]
    assert len(split) >= len(marked) - 1  # all but eh_proj
    assert len(global_names(built)) == len(list(built.named_parameters()))
    state = {key: value for key, value in built.state_dict().items() if "_extra_state" not in key}
    built.load_state_dict(state)
    state.popitem()
    with pytest.raises(RuntimeError, match="does not fit the model: missing"):
        built.load_state_dict(state)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_same_logits_as_with_torch(model):
    batch = batch_of(SyntheticStream(), 0, 2)
    tokens, positions = batch["tokens"].cuda(), batch["position_ids"].cuda()
    with torch.no_grad():
        ours, theirs = (build(model, b, "cuda").eval()(tokens, positions, None) for b in ("torch", "te"))
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()


@needs_gpu
@pytest.mark.gpu
def test_fp8_stays_near_bf16():
    batch = batch_of(SyntheticStream(), 0, 4)
    tokens, positions = batch["tokens"].cuda(), batch["position_ids"].cuda()
    with torch.no_grad():
        bf16 = build("dense", "te", "cuda", "bf16").eval()(tokens, positions, None).float()
        fp8 = build("dense", "te", "cuda", "fp8").eval()(tokens, positions, None).float()
    assert (fp8 - bf16).norm() < 0.1 * bf16.norm()
    assert not torch.equal(fp8, bf16)
