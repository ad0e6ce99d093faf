"""The reference model against plain attention written out by hand, and against itself: eager and
SDPA, cached and uncached, padded and packed, in evaluation and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from tests.unit.tiny import FAMILY_NAMES, tiny_edit
from tests.unit.tiny_edited import tiny_edited
from vllm_attnedit.config import FULL, LATENT, SLIDING
from vllm_attnedit.hf import AttnEditForCausalLM
from vllm_attnedit.tensors import expected_tensors

GATES = ("headwise", "elementwise", None)


def prompt(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 500, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: AttnEditForCausalLM, ids: Tensor, **kw) -> Tensor:
    return model(ids, **kw).logits


def rotate(x: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """RoPE in the half-rotation layout, from its definition, on (T, ..., width)."""
    angle = torch.arange(x.shape[0]).double()[:, None] * base ** (
        -torch.arange(0, width, 2).double() / width
    )
    cos, sin = angle.cos(), angle.sin()
    while cos.ndim < x.ndim:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def by_hand(attention: Any, x: Tensor, window: int | None) -> Tensor:
    """One layer's ``self_attn`` on (T, E) in float64, head by head and query by query."""
    p = {name: value.double() for name, value in attention.named_parameters()}
    x = x.double()

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)

    def norm(name: str, y: Tensor) -> Tensor:
        scaled = y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * p[f"{name}.weight"]

    tokens, heads = x.shape[0], 4
    if "kv_b_proj.weight" in p:
        rank, rope, nope = 64, 16, 32
        if "q_a_proj.weight" in p:
            q = linear("q_b_proj", norm("q_a_layernorm", linear("q_a_proj", x)))
        else:
            q = linear("q_proj", x)
        q = q.view(tokens, heads, nope + rope)
        latent, k_pe = linear("kv_a_proj_with_mqa", x).split([rank, rope], -1)
        per_head = "k_norm.weight" in p
        kv = linear("kv_b_proj", latent if per_head else norm("kv_a_layernorm", latent))
        k_nope, v = kv.view(tokens, heads, -1).split([nope, kv.shape[1] // heads - nope], -1)
        k = torch.cat([k_nope, k_pe[:, None].expand(-1, heads, -1)], -1)
        if per_head:  # as the teacher's: on whole heads, before rotation
            q, k = norm("q_norm", q), norm("k_norm", k)
        q, k = (torch.cat([y[..., :nope], rotate(y[..., nope:], rope)], -1) for y in (q, k))
    else:
        q, k, v = (linear(f"{n}_proj", x).view(tokens, -1, 32) for n in "qkv")
        if "q_norm.weight" in p:
            q, k = norm("q_norm", q), norm("k_norm", k)
        q, k = rotate(q, 32), rotate(k, 32)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    out = torch.empty(tokens, heads, v.shape[-1], dtype=torch.float64).fill_(torch.nan)
    for t in range(tokens):
        first = 0 if window is None else max(0, t - window + 1)
        for h in range(heads):
            scores = k[first : t + 1, h] @ q[t, h] / q.shape[-1] ** 0.5
            out[t, h] = scores.softmax(0) @ v[first : t + 1, h]
    if "g_proj.weight" in p:
        out = out * torch.sigmoid(linear("g_proj", x)).view(tokens, heads, -1)
    return linear("o_proj", out.flatten(1))


HAND_CASES = [(f, t) for f in FAMILY_NAMES for t in ("gateswa", "mla", "mla-q-lora")]
HAND_CASES += [("qwen3", "mla-normed"), ("qwen3_moe", "mla-normed")]


@pytest.mark.parametrize(("family", "target"), HAND_CASES)
@pytest.mark.parametrize("gate", GATES)
def test_layers_equal_attention_by_hand(family: str, target: str, gate: str | None):
    extra: dict[str, Any] = {}
    if target == "mla-q-lora":
        extra = {"q_lora_rank": 48}
    elif target == "mla-normed":
        extra = {"qk_norm": "per_head"}
    edit = tiny_edit(target.split("-")[0], gate=gate, **extra)
    model = tiny_edited(family, edit)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    layers: Any = model.model.layers
    for i, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(
            lambda m, args, kw, out, i=i: seen.__setitem__(i, (kw["hidden_states"], out[0])),
            with_kwargs=True,
        )
    logits(model, prompt(29))
    for i, layer in enumerate(layers):
        window = edit.sliding_window if edit.layer_types[i] == SLIDING else None
        expected = by_hand(layer.self_attn, seen[i][0][0], window)
        actual = seen[i][1][0].double()
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


def mixed_edit(window: int = 5):
    """All three kinds of layer in one model."""
    types = (SLIDING, LATENT, SLIDING, FULL)
    dims = {k: getattr(tiny_edit("mla"), k) for k in ("kv_lora_rank", "qk_nope_head_dim")}
    dims |= {k: getattr(tiny_edit("mla"), k) for k in ("qk_rope_head_dim", "v_head_dim")}
    return tiny_edit("gateswa", window=window, **{"layer_types": types, **dims})


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_eager_equals_sdpa(family: str):
    model = tiny_edited(family, mixed_edit())
    ids = prompt(40, batch=2)
    model.set_attn_implementation("sdpa")
    expected = logits(model, ids)
    model.set_attn_implementation("eager")
    assert torch.allclose(logits(model, ids), expected, atol=2e-4)


@settings(max_examples=25, deadline=None)
@given(
    window=st.integers(1, 12),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    implementation=st.sampled_from(["eager", "sdpa"]),
)
def test_cached_chunks_equal_one_pass(window: int, chunks: list[int], implementation: str):
    model = tiny_edited("llama", mixed_edit(window))
    model.set_attn_implementation(implementation)
    ids = prompt(sum(chunks))
    expected, cache, parts = logits(model, ids), None, []
    for chunk in ids.split(chunks, dim=1):
        with torch.no_grad():
            step = model(chunk, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        parts.append(step.logits)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=2e-4)


@pytest.mark.parametrize("window", [1, 4, 16])
@pytest.mark.parametrize("kind", ["everything", "static"])
def test_any_cache_of_transformers_will_do(window: int, kind: str):
    """Also one that knows nothing of windows and keeps all keys."""
    model = tiny_edited("llama", tiny_edit("gateswa", window=window))
    ids = prompt(20)
    cache = DynamicCache() if kind == "everything" else StaticCache(model.config, max_cache_len=32)
    with torch.no_grad():
        steps = [model(part, past_key_values=cache, use_cache=True) for part in ids.split(7, dim=1)]
    parts = [step.logits for step in steps]
    assert torch.allclose(torch.cat(parts, 1), logits(model, ids), atol=2e-4)


def test_a_static_cache_keeps_the_factors_of_a_per_head_norm():
    """They are float32 beside latents of bfloat16, and a static layer has one dtype."""
    model = tiny_edited("qwen3", tiny_edit("mla", qk_norm="per_head")).bfloat16()
    ids, outputs = prompt(11), []
    for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=16)):
        with torch.no_grad():
            first = model(ids[:, :8], past_key_values=cache, use_cache=True).logits
            second = model(ids[:, 8:], past_key_values=cache, use_cache=True).logits
        outputs.append(torch.cat([first, second], 1))
    torch.testing.assert_close(outputs[0], outputs[1], atol=0.2, rtol=0.05)


def test_window_layers_cache_only_their_window():
    model = tiny_edited("qwen3", mixed_edit(window=5))
    with torch.no_grad():
        cache = model(prompt(30), use_cache=True).past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers] == [4, 30, 4, 30]
    # A latent layer holds one latent (R) and one RoPE key (P) a token, for all heads together.
    assert cache.layers[1].keys.shape == (1, 1, 30, 64)
    assert cache.layers[1].values.shape == (1, 1, 30, 16)


@pytest.mark.parametrize(
    ("family", "target", "extra"),
    [("qwen2", "gateswa", {}), ("qwen2", "mla", {}), ("qwen3", "mla", {"qk_norm": "per_head"})],
)
def test_generate_equals_stepwise_argmax(family: str, target: str, extra: dict[str, Any]):
    model = tiny_edited(family, tiny_edit(target, **extra))
    ids = prompt(11)
    expected = ids
    for _ in range(24):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    generated = model.generate(
        ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(generated, expected)


def test_left_padding_changes_nothing():
    model = tiny_edited("qwen3", mixed_edit())
    ids = prompt(20)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids], 1)
    mask = (torch.arange(27) >= 7).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    actual = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 7:]
    assert torch.allclose(actual, logits(model, ids), atol=2e-4)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_saves_and_loads_through_the_auto_class(family: str, tmp_path: Path):
    model = tiny_edited(family, mixed_edit())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is AttnEditForCausalLM
    assert torch.equal(logits(loaded, prompt(20)), logits(model, prompt(20)))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_tensors_are_the_expected_ones(family: str, tied: bool, tmp_path: Path):
    from safetensors import safe_open

    model = tiny_edited(family, mixed_edit(), tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == expected_tensors(model.config)


def test_training_step_reaches_every_edited_tensor():
    model = tiny_edited("qwen3_moe", mixed_edit())
    model.gradient_checkpointing_enable()
    model.train()
    ids = prompt(24, batch=2)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        if "self_attn" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_hidden_states_and_attentions_are_recorded():
    model = tiny_edited("llama", mixed_edit())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(prompt(12), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 5
    assert [tuple(a.shape) for a in output.attentions] == [(1, 4, 12, 12)] * 4
    # The window: nothing beyond the last five keys.
    assert output.attentions[0][0, :, 11, :7].abs().max() == 0
