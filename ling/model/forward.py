"""One forward pass as megatron-core's pipeline schedules call it: batch in, loss function out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from ling.model.attention import document_mask

Batch = dict[str, torch.Tensor]


def forward_step(batches: Iterator[Batch], model: Any, device: torch.device) -> tuple[torch.Tensor, Any]:
    """Take a micro-batch and run the model on it.

    Args:
        batches: tokens, labels, position_ids int64 `[B, S]`, loss_mask fp32 `[B, S]`; document_ids where attention
            stays within documents.
        model: a (wrapped) model chunk.

    Returns:
        The chunk's output (per-token losses `[B, S]` on the last stage) and the function that turns it into
        `(loss sum, tokens, {"loss": [loss sum, tokens]})`.
    """
    batch = {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
    mask = document_mask(batch["document_ids"]) if "document_ids" in batch else None
    output = model(
        batch["tokens"],
        batch["position_ids"],
        mask,
        labels=batch["labels"],
        # Whole numbers: megatron-core counts the MTP loss' tokens by summing this, which bf16 could not hold.
        loss_mask=batch["loss_mask"].to(torch.int64),
    )
    return output, partial(loss_sum, batch["loss_mask"])


def loss_sum(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the per-token losses, number of tokens, and both for the log (all gradients are divided by the tokens of
    the global batch at the end of the step)."""
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum().to(torch.int)
    return total, tokens, {"loss": torch.stack([total.detach().double(), tokens.double()])}


def take_mtp_loss() -> torch.Tensor | None:
    """Sum over this step's micro-batches of the mean multi-token-prediction loss, and start anew; None without it."""
    tracker = MTPLossLoggingHelper.tracker
    values = tracker.get("loss_values", tracker.get("values"))  # the name in megatron-core 0.19, and the one in 0.16
    if values is None:
        return None
    total = values.detach().mean().double()
    values.zero_()
    return total
