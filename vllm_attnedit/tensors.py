"""Names and shapes of every tensor in an edited checkpoint, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_attnedit.config import LATENT, AttnEditConfig

Shape = tuple[int, ...]


def expected_tensors(config: AttnEditConfig) -> dict[str, Shape]:
    """Every tensor the checkpoint must hold, by name. A tied ``lm_head.weight`` is not one of them.

    Experts are named one by one, as Hugging Face checkpoints hold them.
    """
    tensors: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = (config.hidden_size,)
        for name, shape in attention_tensors(config, layer).items():
            tensors[f"{prefix}.self_attn.{name}"] = shape
        for name, shape in _mlp_tensors(config, layer):
            tensors[f"{prefix}.mlp.{name}"] = shape
    return tensors


def attention_tensors(config: AttnEditConfig, layer: int) -> dict[str, Shape]:
    """The tensors of one layer's ``self_attn``, by their name inside it."""
    edit, hidden = config.edit, config.hidden_size
    heads, head_dim = config.num_attention_heads, config.head_dim
    tensors: dict[str, Shape] = {}

    def linear(name: str, out_features: int, in_features: int, bias: bool) -> None:
        tensors[f"{name}.weight"] = (out_features, in_features)
        if bias:
            tensors[f"{name}.bias"] = (out_features,)

    if edit.layer_types[layer] == LATENT:
        assert edit.kv_lora_rank and edit.qk_rope_head_dim
        assert edit.qk_nope_head_dim and edit.v_head_dim
        q_width = heads * edit.qk_head_dim
        if edit.q_lora_rank is None:
            linear("q_proj", q_width, hidden, config.qkv_bias)
        else:
            linear("q_a_proj", edit.q_lora_rank, hidden, config.qkv_bias)
            tensors["q_a_layernorm.weight"] = (edit.q_lora_rank,)
            linear("q_b_proj", q_width, edit.q_lora_rank, False)
        latent_width = edit.kv_lora_rank + edit.qk_rope_head_dim
        linear("kv_a_proj_with_mqa", latent_width, hidden, config.qkv_bias)
        if edit.per_head_norm:
            tensors["q_norm.weight"] = tensors["k_norm.weight"] = (edit.qk_head_dim,)
        else:
            tensors["kv_a_layernorm.weight"] = (edit.kv_lora_rank,)
        kv_b_width = heads * (edit.qk_nope_head_dim + edit.v_head_dim)
        linear("kv_b_proj", kv_b_width, edit.kv_lora_rank, False)
    else:
        linear("q_proj", heads * head_dim, hidden, config.qkv_bias)
        for name in ("k_proj", "v_proj"):
            linear(name, config.num_key_value_heads * head_dim, hidden, config.qkv_bias)
        if config.family.qk_norm:
            tensors["q_norm.weight"] = tensors["k_norm.weight"] = (head_dim,)
    linear("o_proj", hidden, heads * head_dim, config.o_bias)
    if config.gate_size:
        linear("g_proj", config.gate_size, hidden, False)
    return tensors


def is_moe_layer(config: AttnEditConfig, layer: int) -> bool:
    """Whether the layer's MLP is a mixture of experts."""
    if not config.family.moe or layer in (getattr(config, "mlp_only_layers", None) or []):
        return False
    return config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0


def _mlp_tensors(config: AttnEditConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    if not is_moe_layer(config, layer):
        yield from _gated_mlp(config, "", config.intermediate_size)
        return
    yield "gate.weight", (config.num_experts, config.hidden_size)
    for expert in range(config.num_experts):
        yield from _gated_mlp(config, f"experts.{expert}.", config.moe_intermediate_size)


def _gated_mlp(config: AttnEditConfig, prefix: str, width: int) -> Iterator[tuple[str, Shape]]:
    hidden = config.hidden_size
    shapes = {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
    for name, shape in shapes.items():
        yield f"{prefix}{name}.weight", shape
        if getattr(config, "mlp_bias", False):
            yield f"{prefix}{name}.bias", shape[:1]
