"""What a trained model says: losses of given tokens, and new ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ling.model.attention import document_mask


@torch.no_grad()
def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of each label in nats, fp32 `[B, S]`.

    Args:
        model: a whole model on this rank, in evaluation mode.
        batch: tokens, labels, position_ids `[B, S]`; document_ids where attention stays within documents.
    """
    mask = document_mask(batch["document_ids"]) if "document_ids" in batch else None
    return model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"]).float()


@torch.no_grad()
def generate(
    model: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    context: int,
    eos_id: int,
    vocab_size: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Continue a prompt, one token at a time, until the end of the document or `max_tokens`.

    The whole context is computed anew for each token: meant for a look at a checkpoint, not for serving.

    Args:
        model: a whole model on this rank, in evaluation mode.
        prompt: token ids, at least one.
        context: most tokens that the model sees at once; older ones are dropped.
        vocab_size: ids from here on are padding of the embedding and never drawn.
        temperature: 0 takes the likeliest token always.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the draws.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(max_tokens):
        tokens = torch.tensor([ids[-context:]], device=device)
        positions = torch.arange(tokens.shape[1], device=device)[None]
        logits_V = model(tokens, positions, None)[0, -1, :vocab_size].float().cpu()
        token = int(logits_V.argmax()) if temperature == 0 else _draw(logits_V / temperature, top_p, generator)
        if token == eos_id:
            return
        ids.append(token)
        yield token


def _draw(logits_V: torch.Tensor, top_p: float, generator: torch.Generator) -> int:
    probability_V, order_V = torch.softmax(logits_V, -1).sort(descending=True)
    before_V = probability_V.cumsum(-1) - probability_V  # of the likelier tokens; 0 for the first, which always stays
    probability_V = probability_V.masked_fill(before_V >= top_p, 0.0)
    return int(order_V[torch.multinomial(probability_V, 1, generator=generator)])
