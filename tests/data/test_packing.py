"""Packed documents: with mask and positions of their own each computes what it computes alone, on every layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ling.model.attention import document_mask
from ling.trainer import Trainer
from tests.dist.training import MOE, SyntheticStream, build_single, tiny_config, train_losses

MODEL = replace(MOE, activation="swiglu", num_layers=2, mtp_num_layers=0)
LENGTHS = [9, 14, 1, 8]
RESET = {"reset_attention_mask": True, "reset_position_ids": True}
LAYOUTS = {
    "TP2+SP": (2, 4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, 2, {"pipeline_model_parallel_size": 2}),
}


class PackedStream(SyntheticStream):
    """Each sample holds documents of LENGTHS, in an order of its own."""

    def sample(self, i: int) -> dict[str, np.ndarray]:
        lengths = np.roll(LENGTHS, i)
        return super().sample(i) | {
            "document_ids": np.repeat(np.arange(len(lengths)), lengths),
            "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        }


def pack(trainer: Trainer) -> None:
    """Train on packed documents."""
    trainer.train_stream = PackedStream()


def logits_of(model, stream: PackedStream, *, mask: bool) -> torch.Tensor:
    samples = [stream.sample(i) for i in range(2)]
    batch = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}
    attend = document_mask(batch["document_ids"]) if mask else None
    with torch.no_grad():
        return model(batch["tokens"], batch["position_ids"], attend)


@pytest.mark.ranks(1)
def test_packed_documents_do_not_see_each_other():
    model, stream = build_single(tiny_config(model=MODEL, data=RESET)).eval(), PackedStream()
    packed = logits_of(model, stream, mask=True)
    for row in range(2):
        sample, start = stream.sample(row), 0
        for length in np.roll(LENGTHS, row):
            tokens = torch.from_numpy(sample["tokens"][start : start + length])[None]
            with torch.no_grad():
                alone = model(tokens, torch.arange(length)[None], None)
            torch.testing.assert_close(packed[row, start : start + length], alone[0], rtol=1e-5, atol=1e-5)
            start += length


@pytest.mark.ranks(1)
def test_rotary_embeddings_see_differences_only():
    with_reset = build_single(tiny_config(model=MODEL, data=RESET)).eval()
    without = build_single(tiny_config(model=MODEL)).eval()
    stream = PackedStream()
    inside = logits_of(with_reset, stream, mask=True), logits_of(without, stream, mask=True)
    torch.testing.assert_close(*inside, rtol=1e-5, atol=1e-5)
    across = logits_of(with_reset, stream, mask=False), logits_of(without, stream, mask=False)
    first = LENGTHS[0]
    torch.testing.assert_close(across[0][0, :first], across[1][0, :first], rtol=1e-5, atol=1e-5)
    assert (across[0] - across[1])[0, first:].abs().max() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("data", [RESET, {"reset_position_ids": True}], ids=["mask and positions", "positions"])
def test_layouts_agree_on_packed_documents(ranks, layout, data):
    size, micro_batch_size, parallel = LAYOUTS[layout]
    change = pack if "reset_attention_mask" in data else pack_without_mask
    (single,) = ranks.run(1, train_losses, tiny_config(model=MODEL, data=data), 3, change)
    config = tiny_config(size, MODEL, data=data, parallel=parallel, train={"micro_batch_size": micro_batch_size})
    for outcome in ranks.run(size, train_losses, config, 3, change):
        np.testing.assert_allclose(outcome.losses, single.losses, rtol=1e-5)


class PositionedStream(PackedStream):
    """Documents that see those before them."""

    def sample(self, i: int) -> dict[str, np.ndarray]:
        sample = super().sample(i)
        del sample["document_ids"]
        return sample


def pack_without_mask(trainer: Trainer) -> None:
    """Train on packed documents that see those before them."""
    trainer.train_stream = PositionedStream()
