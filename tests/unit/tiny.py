"""Tiny teachers of every family, small enough for unit tests and shaped like real checkpoints.

Their weights are random but not flat: attention is peaked, gates and biases matter, norm weights
are not ones, and the next-token distribution is far from uniform, so that a wrong layer shows in
logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vllm_attnedit.config import FULL, LATENT, SLIDING, AttentionEdit

FAMILY_NAMES = ("llama", "qwen2", "qwen3", "qwen3_moe")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = ("t h", "th e", "i n", "a n", "an d", "Ġ t", "o f", "e r", "Ġ a", "r e")


def tiny_config(family: str = "qwen3", **overrides: Any) -> PreTrainedConfig:
    """A teacher configuration: 4 layers, 4 query and 2 KV heads of 32, hidden 128, 512 tokens."""
    values: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "architectures": None,
    }
    if family == "qwen3_moe":
        values |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return CONFIG_MAPPING[family](**(values | overrides))


@torch.no_grad()
def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights at the scale of a trained model, whatever the family's own initialisation is."""

    def noise(parameter: nn.Parameter) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(0.3 * noise(parameter))
        elif parameter.ndim == 1:  # norms
            parameter.copy_(1 + 0.2 * noise(parameter))
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.copy_(0.3 * noise(parameter))
        else:
            gain = 1.5 if "q_proj" in name or "k_proj" in name or ".gate.weight" in name else 1.0
            parameter.copy_(gain * parameter.shape[-1] ** -0.5 * noise(parameter))


def tiny_model(family: str = "qwen3", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny teacher in memory, in float32 and evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    randomise(model, torch.Generator().manual_seed(seed))
    return model.float().eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ten merges, three special tokens and a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL_TOKENS, *alphabet, *(m.replace(" ", "") for m in MERGES)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[(a, b) for a, b in (merge.split(" ") for merge in MERGES)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[2],
        pad_token=SPECIAL_TOKENS[0],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def tiny_teacher(
    family: str,
    path: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a tiny teacher checkpoint (safetensors, tokenizer, generation config); returns its
    folder.

    Args:
        family: one of ``FAMILY_NAMES``.
        path: folder, created if needed.
        seed: of the weights.
        dtype: of the stored weights.
        max_shard_size: a small one (``"200KB"``) splits the checkpoint into shards with an index.
        **overrides: fields of the teacher's configuration.
    """
    folder = Path(path)
    model = tiny_model(family, seed=seed, **overrides).to(dtype)
    model.config.dtype = dtype
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[2, 0], pad_token_id=0
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_edit(
    target: str = "gateswa", *, layers: int = 4, window: int = 8, **overrides: Any
) -> AttentionEdit:
    """An edit of a tiny teacher: three window layers and a full one, or latents half of KV."""
    if target == "mla":
        values: dict[str, Any] = {"layer_types": (LATENT,) * layers, "kv_lora_rank": 64}
        values |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    else:
        types = tuple(FULL if i == layers - 1 else SLIDING for i in range(layers))
        values = {"layer_types": types, "sliding_window": window, "gate": "headwise"}
    return AttentionEdit(**(values | overrides))
