"""Ling 2.0 models for transformers 4.51 and later: dense or mixture of experts, any FFN activation, MTP head.

Nothing here depends on the version of transformers beyond its base classes.
"""

# B: sequences, S: tokens of a sequence, P: tokens in the cache, V: vocabulary

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_bailing_moe_v2 import BailingMoeV2Config
from .ffn_activations import ROWS
from .layers_bailing_moe_v2 import (
    ACTIVATIONS,
    BailingMoeV2DecoderLayer,
    BailingMoeV2Gate,
    BailingMoeV2MTPLayer,
    BailingMoeV2RMSNorm,
    rotary_tables,
)

ACTIVATIONS.update(ROWS)
# transformers 5.24 renames `past_key_values` to `cache`: callers say either, outputs have the one that is theirs
_CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"


@dataclass
class BailingMoeV2Output(CausalLMOutputWithPast):
    """`mtp_logits` has one tensor `[B, S, V]` per MTP layer: at position t the logits of the token t + 2."""

    mtp_loss: Tensor | None = None
    mtp_logits: tuple[Tensor, ...] | None = None


class BailingMoeV2PreTrainedModel(PreTrainedModel):
    """What transformers wants to know of the architecture."""

    config_class = BailingMoeV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BailingMoeV2DecoderLayer", "BailingMoeV2MTPLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = True

    def post_init(self) -> None:
        super().post_init()
        # not as an attribute of the class: transformers 4 then refuses models without them, and buffers
        self._keep_in_fp32_modules_strict = ["expert_bias", "scalars"]

    def _init_weights(self, module: nn.Module) -> None:
        # through torch.nn.init alone: transformers 5 keeps it from touching what was loaded
        if isinstance(module, (nn.Linear, nn.Embedding, BailingMoeV2Gate)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, BailingMoeV2RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, BailingMoeV2Gate) and module.expert_bias is not None:
            nn.init.zeros_(module.expert_bias)


class BailingMoeV2Model(BailingMoeV2PreTrainedModel):
    """The decoder without output layer. `layers` holds the MTP layers after the others."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        count = config.num_hidden_layers
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        layers: list[nn.Module] = [BailingMoeV2DecoderLayer(config, i) for i in range(count)]
        layers += [BailingMoeV2MTPLayer(config, count + i) for i in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        recompute = self.gradient_checkpointing and self.training
        use_cache = bool(getattr(self.config, "use_cache", True) if use_cache is None else use_cache) and not recompute
        cache = _either(past_key_values, cache)
        cache = (DynamicCache() if cache is None else cache) if use_cache else None
        rotary, mask = self._tables(x, attention_mask, position_ids, cache)
        states, attentions = [x], []
        for layer in self.layers[: self.config.num_hidden_layers]:
            if recompute:
                x, weights = self._gradient_checkpointing_func(layer.__call__, x, rotary, mask)
            else:
                x, weights = layer(x, rotary, mask, cache)
            if output_hidden_states:
                states.append(x)
            attentions.append(weights)
        x = self.norm(x)
        states[-1] = x
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            **{_CACHE: cache},
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _tables(self, x: Tensor, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Tensor | None]:
        past = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        mask = _attention_mask(attention_mask, x.shape[1], past, x)
        return rotary_tables(self.config, position_ids, x.dtype), mask

    def mtp_hidden(self, input_ids: Tensor, hidden: Tensor, attention_mask: Any, position_ids: Any) -> list[Tensor]:
        """What the output layer turns into the logits of each MTP layer; whole sequences, without a cache."""
        rotary, mask = self._tables(hidden, attention_mask, position_ids, None)
        found = []
        layers: Any = self.layers[self.config.num_hidden_layers :]
        for layer in layers:
            input_ids = F.pad(input_ids[:, 1:], (0, 1))  # the last position has no next token: id 0, as in training
            hidden = layer.predict(self.word_embeddings(input_ids), hidden, rotary, mask)
            found.append(hidden)
        return found


def _either(past_key_values: Any, cache: Any) -> Any:
    if past_key_values is not None and cache is not None:
        raise ValueError("give either past_key_values or cache, which are the same")
    return cache if past_key_values is None else past_key_values


def _attention_mask(attention_mask: Tensor | None, length: int, past: int, x: Tensor) -> Tensor | None:
    """Bool `[B or 1, 1, S, P + S]`, true where a token may attend; None where plain causal attention does."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    plain = attention_mask is None or bool(attention_mask.all())
    if plain and (past == 0 or length == 1):
        return None
    rows = torch.arange(past, past + length, device=x.device)[:, None]
    columns = torch.arange(past + length, device=x.device)
    mask = (columns <= rows)[None, None]
    if attention_mask is not None and not plain:
        if attention_mask.shape[-1] != past + length:
            raise ValueError(f"attention_mask for {attention_mask.shape[-1]} tokens, not {past + length}")
        # padding attends to itself, so that no row is empty
        mask = mask & attention_mask.bool()[:, None, None, :] | (columns == rows)
    return mask


class BailingMoeV2ForCausalLM(BailingMoeV2PreTrainedModel, GenerationMixin):
    """The decoder with its output layer, and the MTP head on request."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.model = BailingMoeV2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.word_embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_mtp_logits: bool = False,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As every causal language model of transformers.

        With `output_mtp_logits`, which needs whole sequences of `input_ids`, the MTP layers' logits too. In training
        with labels their loss, times `mtp_loss_scaling_factor`, is part of `loss`.
        """
        cache = _either(past_key_values, cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        found = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        hidden = found.last_hidden_state
        kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        logits = self.lm_head(kept)
        loss = None if labels is None else _next_token_loss(logits, labels, 1, kwargs.get("num_items_in_batch"))
        mtp_loss = mtp_logits = None
        factor = self.config.mtp_loss_scaling_factor
        trains_mtp = loss is not None and self.training and bool(factor)
        if self.config.num_nextn_predict_layers and (output_mtp_logits or trains_mtp):
            if input_ids is None or past:
                raise ValueError("MTP logits need input_ids of whole sequences")
            heads = self.model.mtp_hidden(input_ids, hidden, attention_mask, position_ids)
            mtp_logits = tuple(self.lm_head(head) for head in heads)
            if labels is not None and loss is not None:
                items = kwargs.get("num_items_in_batch")
                losses = [_next_token_loss(x, labels, 2 + i, items) for i, x in enumerate(mtp_logits)]
                mtp_loss = torch.stack(losses).mean()
                loss = loss + factor * mtp_loss if trains_mtp else loss
        output = BailingMoeV2Output(
            loss=loss,
            logits=logits,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            mtp_loss=mtp_loss,
            mtp_logits=mtp_logits if output_mtp_logits else None,
            **{_CACHE: getattr(found, _CACHE)},
        )
        return output if return_dict is None or return_dict else output.to_tuple()


def _next_token_loss(logits: Tensor, labels: Tensor, shift: int, num_items: Any) -> Tensor:
    """Cross-entropy of the token `shift` positions on, over the labels that are not -100."""
    targets = labels[:, shift:].to(logits.device).flatten()
    flat = logits[:, : labels.shape[1] - shift].float().flatten(0, 1)
    if num_items is None:
        return F.cross_entropy(flat, targets)
    return F.cross_entropy(flat, targets, reduction="sum") / num_items
