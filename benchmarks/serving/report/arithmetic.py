"""What a burst must take by arithmetic, beside what it took.

A lower bound, from the device's data sheet: prompts are bound by multiply-adds, decode steps by the
bytes of weights and KV cache that they read. What was measured above the sum is what kernels,
scheduling and sampling cost beyond the hardware's limit.

    prefill  = requests x (2 x parameters x P + attention) / peak operations
    attention of a layer = 2 x P^2 x heads x (key width + value width) / 2 where all is seen,
                           2 x P x W x heads x (key width + value width) in a window
    decode   = steps x (weight bytes + running x KV bytes at the mean length) / peak bandwidth
    steps    = requests x output tokens / requests running at once

Several devices share the multiply-adds. Tensor parallelism splits weights and KV heads over a
copy's devices, latents it does not; copies share the running requests out, and of a mixture of
experts the experts too. What devices say to each other is not in the bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_attnedit.accounting import kv_bytes_per_request, kv_layers


@dataclass(frozen=True)
class Device:
    """Peaks of a device: bf16 operations a second without sparsity, bytes a second."""

    operations: float
    bandwidth: float


DEVICES = {
    # NVIDIA H200 and H100 SXM data sheets
    "H200": Device(989e12, 4.8e12),
    "H100": Device(989e12, 3.35e12),
}


def device_of(machine: str) -> Device | None:
    """The device that a result's ``machine`` names, if its peaks are known."""
    return next((device for name, device in DEVICES.items() if name in machine), None)


def attention_parameters(config: Any, layer_type: str) -> int:
    """Weights of one attention layer's projections, gates left out (below 1%)."""
    d, heads = config.hidden_size, config.num_attention_heads
    if layer_type == "latent_attention":
        edit = config.attention_edit
        rope, nope = edit["qk_rope_head_dim"], edit["qk_nope_head_dim"]
        rank, value = edit["kv_lora_rank"], edit["v_head_dim"]
        own: int = d * heads * (nope + rope) + d * (rank + rope)
        return own + rank * heads * (nope + value) + heads * value * d
    head_dim = getattr(config, "head_dim", None) or d // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size: int = 2 * d * heads * head_dim + 2 * d * kv_heads * head_dim
    return size


def parameters(config: Any, *, active: bool) -> int:
    """Weights of all layers, embeddings and output head left out.

    Args:
        active: of a mixture of experts, those that one token uses; else all.
    """
    experts = getattr(config, "num_experts", None)
    width = 3 * config.hidden_size
    if experts:
        used = config.num_experts_per_tok if active else experts
        mlp = used * width * config.moe_intermediate_size + experts * config.hidden_size
    else:
        mlp = width * config.intermediate_size
    return sum(attention_parameters(config, layer.layer_type) + mlp for layer in kv_layers(config))


def attention_operations(config: Any, tokens: int) -> float:
    """Multiply-adds, counted twice, of all layers' attention over a prompt of ``tokens``."""
    heads, total = config.num_attention_heads, 0.0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for layer in kv_layers(config):
        widths = 2 * head_dim
        if layer.layer_type == "latent_attention":
            edit = config.attention_edit
            widths = edit["qk_nope_head_dim"] + edit["qk_rope_head_dim"] + edit["v_head_dim"]
        seen = tokens / 2 if layer.window is None else min(layer.window, tokens / 2)
        total += 2 * tokens * seen * heads * widths
    return total


def weight_bytes(config: Any, *, active: bool, tensor: int, data: int) -> float:
    """Bytes of 16-bit weights that a decode step reads on each device, the output head's included.

    Args:
        config: of the served model.
        active: as in :func:`parameters`.
        tensor: devices of a copy.
        data: copies.
    """
    attention = sum(attention_parameters(config, layer.layer_type) for layer in kv_layers(config))
    mlp = parameters(config, active=active) - attention
    group = tensor * data if getattr(config, "num_experts", None) else tensor
    head = config.hidden_size * config.vocab_size
    return 2 * ((attention + head) / tensor + mlp / group)


def bound(
    config: Any,
    device: Device,
    *,
    requests: int,
    prompt: int,
    output: int,
    running: float,
    tensor: int = 1,
    data: int = 1,
) -> dict[str, float]:
    """Seconds that a burst takes at least.

    Args:
        config: of the served model.
        requests: in the burst.
        prompt, output: tokens of each.
        running: at once, as measured, on all devices.
        tensor: devices of a copy.
        data: copies.

    Returns:
        ``prefill_s``, ``decode_s``, their sum ``total_s``, and ``step_s`` of one decode step.
    """
    per_prompt = 2 * parameters(config, active=True) * prompt + attention_operations(config, prompt)
    prefill = requests * per_prompt / (device.operations * tensor * data)
    # With many tokens a step, all experts are read.
    weights = weight_bytes(config, active=running < 2, tensor=tensor, data=data)
    cache = running / data * kv_bytes_per_request(config, prompt + output // 2, tp=tensor)
    step = (weights + cache) / device.bandwidth
    decode = step * requests * output / running
    return {
        "prefill_s": prefill,
        "decode_s": decode,
        "total_s": prefill + decode,
        "step_s": step,
    }
