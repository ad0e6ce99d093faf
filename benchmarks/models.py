"""Checkpoints without weights: the true dimensions of the models the project is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_attnedit.config import AttentionEdit, AttnEditConfig
from vllm_attnedit.edit.patterns import EditPlan, build_edit

_QWEN3 = {
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "dtype": "bfloat16",
}

# Hugging Face: Qwen/Qwen3-8B, Qwen/Qwen3-30B-A3B, Qwen/Qwen2.5-Coder-1.5B and
# HuggingFaceTB/SmolLM2-135M, config.json
TEACHERS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    },
    "qwen2.5-coder-1.5b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 151_643,
        "eos_token_id": 151_643,
        "dtype": "bfloat16",
    },
    "qwen3-8b": {
        **_QWEN3,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        **_QWEN3,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}


def edit_for(
    teacher: dict[str, Any], target: str, window: int = 128, **choices: Any
) -> AttentionEdit:
    """The default edit of a teacher: every sixth layer full, or latents of 512 + 64.

    Args:
        choices: further ones, as :class:`vllm_attnedit.edit.patterns.EditPlan` has them.
    """
    size = window if target == "gateswa" else None
    plan = EditPlan(target=target, window=size, **choices)
    return build_edit(plan, SimpleNamespace(**teacher))


def write_model(name: str, target: str, folder: Path, window: int = 128, **choices: Any) -> Path:
    """Write ``config.json`` of a teacher (``target="full"``) or of its edit; returns the folder.

    Serve it with ``--load-format dummy`` and token ids as prompts: speed and memory do not depend
    on the values of the weights. ``choices`` are those of :func:`edit_for`.
    """
    teacher = TEACHERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    if target == "full":
        (folder / "config.json").write_text(json.dumps(teacher, indent=2))
    else:
        config = AttnEditConfig(
            base_model_type=teacher["model_type"],
            attention_edit=edit_for(teacher, target, window, **choices),
            **{k: v for k, v in teacher.items() if k not in ("model_type", "architectures")},
        )
        config.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of as many words as there are ids, where none comes with the dimensions.

    Servers detokenize with it, as they would with a real one, and ``vllm bench`` counts with it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", eos_token="t1", pad_token="t1"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
