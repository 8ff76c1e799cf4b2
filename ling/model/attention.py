"""Core attention: softmax(QKᵀ/√d)V without a score matrix in memory, by torch's SDPA or flash-attn."""

# S: tokens of a sequence, B: sequences, N: query heads, G: key/value heads (on this rank), D: size of a head

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ling.platform import optional


class SdpaAttention(torch.nn.Module):
    """Causal attention through `torch.nn.functional.scaled_dot_product_attention`."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **kwargs: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: `[S, B, N, D]`.
            key, value: `[S, B, G, D]`.
            attention_mask: `[B, 1, S, S]`, true where a token (row) may attend (column); null: causal.

        Returns:
            `[S, B, N·D]`.
        """
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BNSD = F.scaled_dot_product_attention(
            q_BNSD,
            k_BGSD,
            v_BGSD,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


class FlashAttention(torch.nn.Module):
    """Causal attention through the flash-attn package."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **kwargs: Any) -> None:
        super().__init__()
        found = optional.find("flash_attn")
        assert found.module is not None, found.problem  # ling.platform.select has made sure
        self._attend = found.module.flash_attn_func

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As `SdpaAttention.forward`; an explicit mask is not supported (the config check refuses it)."""
        assert attention_mask is None
        q_BSND, k_BSGD, v_BSGD = (x.transpose(0, 1) for x in (query, key, value))
        return self._attend(q_BSND, k_BSGD, v_BSGD, causal=True).transpose(0, 1).flatten(2)


def document_mask(document_ids: torch.Tensor) -> torch.Tensor:
    """Causal mask within documents: `[B, S]` ids to `[B, 1, S, S]`, true where a token may attend."""
    same_BSS = document_ids[:, :, None] == document_ids[:, None, :]
    causal_SS = torch.ones(same_BSS.shape[-2:], dtype=torch.bool, device=same_BSS.device).tril()
    return (same_BSS & causal_SS)[:, None]
