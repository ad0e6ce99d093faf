"""Writes a tiny teacher as a GGUF file, as llama.cpp's converter would."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from vllm_attnedit.edit.layout import teacher_tensors
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.edit.teacher import read_config

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Pairs side by side, as llama.cpp wants a Llama's queries and keys."""
    half = rows.shape[0] // heads // 2
    return rows.view(heads, 2, half, -1).transpose(1, 2).reshape(rows.shape)


def write_gguf(
    teacher: Path, file: Path, quantisation: str = "Q8_0", head_from: Tensor | None = None
) -> dict[str, Tensor]:
    """Write ``teacher`` to ``file``; returns each tensor as the file holds it, by its usual name.

    ``head_from`` is written as the output matrix of a model with tied embeddings.
    """
    config, store = read_config(teacher), SafetensorsStore(teacher)
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    _add_tokenizer(writer, teacher)

    held: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}

    def add(name: str, values: Tensor) -> Tensor:
        array = values.numpy()
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else TYPES[quantisation]
        data = gguf.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        return torch.from_numpy(np.array(gguf.dequantize(data, kind))).reshape(values.shape)

    for name in teacher_tensors(config):
        values = store.load(name).float()
        module, _, kind = name.rpartition(".")
        if module in _TOP:
            held[name] = add(f"{_TOP[module]}.{kind}", values)
            continue
        layer, inner = module.removeprefix("model.layers.").split(".", 1)
        if inner.startswith("mlp.experts."):
            stacks.setdefault(f"blk.{layer}.ffn_{inner.split('.')[3][:-5]}_exps.weight", []).append(
                values
            )
            held[name] = values  # replaced below
            continue
        target = f"blk.{layer}.{_NAMES[inner]}.{kind}"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = inner.split(".")[-1]
        if architecture == "llama" and part in heads:
            stored = add(target, interleaved(values, heads[part]))
            half = stored.view(heads[part], -1, 2, *values.shape[1:])
            held[name] = half.transpose(1, 2).reshape(values.shape)
        else:
            held[name] = add(target, values)
    for target, experts in stacks.items():
        whole = add(target, torch.stack(experts))
        layer, part = target.split(".")[1], target.split("_")[1]
        for expert, values in enumerate(whole):
            held[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"] = values
    if head_from is not None:
        add("output.weight", head_from)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


TYPES = {
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_1": gguf.GGMLQuantizationType.Q4_1,
}


def _add_tokenizer(writer: gguf.GGUFWriter, teacher: Path) -> None:
    data = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = sorted(data["model"]["vocab"].items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    control = {token["content"] for token in data["added_tokens"]}
    tokens += [f"<unused{i}>" for i in range(512 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in control else gguf.TokenType.NORMAL for t in tokens]
    )
    merges = data["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template((teacher / "chat_template.jinja").read_text())
