"""The reference model: the teacher of any family with ``self_attn`` replaced layer by layer.

Everything but attention is the teacher's own transformers code, so training runs it, ``generate``
works with it, and the served model is held to it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from vllm_attnedit.config import LATENT, SLIDING, AttnEditConfig
from vllm_attnedit.hf.attention import (
    EditedAttention,
    GatedAttention,
    family_module,
    rms_norm,
)
from vllm_attnedit.hf.latent import LatentAttention


class AttnEditPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the model, in one place."""

    config_class = AttnEditConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "LlamaDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "Qwen3MoeDecoderLayer",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {
        # The base class of every family's decoder layer.
        "hidden_states": GradientCheckpointingLayer,
        "attentions": OutputRecorder(EditedAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Mixtures of experts hold bare parameters, which transformers initialises per family.
        std = self.config.initializer_range
        if type(module).__name__.endswith("MoeExperts"):
            initialization.normal_(module.gate_up_proj, mean=0.0, std=std)
            initialization.normal_(module.down_proj, mean=0.0, std=std)
        elif type(module).__name__.endswith("MoeTopKRouter"):
            initialization.normal_(module.weight, mean=0.0, std=std)


def build_layer(config: AttnEditConfig, layer_idx: int) -> nn.Module:
    """A decoder layer of the teacher's class with the edited attention in place of its own."""
    cls = getattr(family_module(config), f"{config.family.class_prefix}DecoderLayer")
    layer: nn.Module = cls(config, layer_idx)
    latent = config.edit.layer_types[layer_idx] == LATENT
    layer.self_attn = (LatentAttention if latent else GatedAttention)(config, layer_idx)
    return layer


def rotary_embedding(config: AttnEditConfig, width: int) -> nn.Module:
    """The teacher's rotary embedding (base, scaling) at another head width."""
    sized = copy.copy(config)
    sized.head_dim = width
    cls = getattr(family_module(config), f"{config.family.class_prefix}RotaryEmbedding")
    rotary: nn.Module = cls(config=sized)
    return rotary


class AttnEditModel(AttnEditPreTrainedModel):
    """Embedding, edited layers and final norm."""

    def __init__(self, config: AttnEditConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, getattr(config, "pad_token_id", None)
        )
        self.layers = nn.ModuleList(build_layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = rms_norm(config, config.hidden_size)
        types = config.edit.layer_types
        # Only what some layer uses: a fully latent model has no use for the teacher's width.
        widths = {
            "gated": None if set(types) == {LATENT} else config.head_dim,
            "latent": config.edit.qk_rope_head_dim,
        }
        self.rotary_emb = nn.ModuleDict(
            {kind: rotary_embedding(config, width) for kind, width in widths.items() if width}
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The usual arguments of a transformers decoder.

        ``attention_mask`` is a padding mask (B, S), or a dict of prepared masks by layer type
        (``full_attention``, ``sliding_attention``), as packed training batches need.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = position_ids.unsqueeze(0)

        masks = attention_mask
        if not isinstance(masks, dict):
            arguments = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            makers = {
                "full_attention": create_causal_mask,
                "sliding_attention": create_sliding_window_causal_mask,
            }
            masks = {t: makers[t](**arguments) for t in set(self.config.layer_types)}
        rotations = {
            kind: rotary(inputs_embeds, position_ids) for kind, rotary in self.rotary_emb.items()
        }

        hidden_states = inputs_embeds
        # As stored: `config.edit` would parse and check it anew at every step.
        layer_types = self.config.attention_edit["layer_types"]
        for layer, layer_type in zip(self.layers, layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[SLIDING if layer_type == SLIDING else "full_attention"],
                position_embeddings=rotations["latent" if layer_type == LATENT else "gated"],
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class AttnEditForCausalLM(AttnEditPreTrainedModel, GenerationMixin):
    """The edited model with its language-model head; loads through ``AutoModelForCausalLM``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AttnEditConfig) -> None:
        super().__init__(config)
        self.model = AttnEditModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocabulary), or of the last ``logits_to_keep`` tokens, and a loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
