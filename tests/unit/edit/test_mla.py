"""MLA edits that inherit: exact where that is possible, near the teacher where it is not."""

from __future__ import annotations

import random
import string

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.edit.models import divergence, load, logits, tokens
from tests.unit.tiny import FAMILY_NAMES, tiny_teacher
from vllm_attnedit.edit import Calibration, EditPlan, edit_checkpoint
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.errors import AttnEditError

# Tiny teachers are as random as this text, which shows all of their inputs.
TEXT = "".join(random.Random(0).choices(string.printable, k=4000))


def calibration(tokens: int = 1024) -> Calibration:
    return Calibration(TEXT, "test", tokens)


@pytest.mark.parametrize("query_rank", [None, 128])
@pytest.mark.parametrize("gate", ["none", "headwise"])
def test_one_kv_head_at_full_rank_is_the_teacher(tmp_path, gate, query_rank):
    """One KV head, its whole width rotated, full rank, biases that give a constant: all is exact
    but the latent norms, to which a constant 64 times as long as the rest leaves 1 part in 4,000 of
    their variation. Logits have a standard deviation of 3.5."""
    teacher = tiny_teacher("qwen2", tmp_path / "t", num_attention_heads=2, num_key_value_heads=1)
    plan = EditPlan(
        target="mla",
        gate=gate,
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        q_lora_rank=query_rank,
    )
    report = edit_checkpoint(teacher, tmp_path / "out", plan)
    ids = tokens(48)
    expected, found = logits(load(teacher), ids), logits(load(tmp_path / "out"), ids)
    assert (found - expected).abs().max() <= 5e-3
    assert all(kept.key > 0.9999 and kept.value > 0.9999 for kept in report.energy)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_inherit_is_nearer_to_the_teacher_than_random(teacher_of, tmp_path, family):
    ids = tokens(64)
    expected = logits(load(teacher_of(family)), ids)
    distance = {}
    for init in ("inherit", "random"):
        text = calibration() if init == "inherit" else None
        edit_checkpoint(
            teacher_of(family), tmp_path / init, EditPlan(target="mla", init=init), calibration=text
        )
        distance[init] = divergence(expected, logits(load(tmp_path / init), ids))
    assert distance["inherit"] < 0.75 * distance["random"], distance


def test_more_rank_and_more_rope_keep_more(teacher_of, tmp_path):
    ids = tokens(64)
    expected = logits(load(teacher_of()), ids)
    found = []
    for rank, rope in ((8, 4), (32, 16), (128, 32)):
        out = tmp_path / f"{rank}-{rope}"
        plan = EditPlan(target="mla", kv_lora_rank=rank, qk_rope_head_dim=rope)
        report = edit_checkpoint(teacher_of(), out, plan, calibration=calibration())
        kept = report.config.provenance["energy_kept"]
        found.append((kept["key"], kept["value"], -divergence(expected, logits(load(out), ids))))
    keys, values, nearness = zip(*found, strict=True)
    assert list(keys) == sorted(set(keys))
    assert list(values) == sorted(set(values))
    assert 0 < keys[0] < 0.9
    assert nearness[-1] > max(nearness[:-1]) + 1
    # A rank of the full width lacks only what the constant latent takes.
    assert min(keys[-1], values[-1]) > 0.98


@pytest.mark.parametrize("width", [16, 32, 48])
def test_heads_may_be_narrower_or_wider_without_position(teacher_of, tmp_path, width):
    ids = tokens(40)
    expected = logits(load(teacher_of()), ids)
    plan = EditPlan(target="mla", qk_nope_head_dim=width)
    report = edit_checkpoint(teacher_of(), tmp_path / "out", plan, calibration=calibration())
    assert report.config.edit.qk_nope_head_dim == width
    baseline = edit_checkpoint(
        teacher_of(), tmp_path / "same", EditPlan(target="mla"), calibration=calibration()
    )
    same = divergence(expected, logits(load(baseline.out), ids))
    found = divergence(expected, logits(load(tmp_path / "out"), ids))
    if width >= 32:
        assert found == pytest.approx(same, abs=1e-3)
    else:
        assert found < 2 * same + 0.1


def test_text_helps_where_inputs_have_a_mean(tmp_path):
    """As those of trained models do. Only text shows it, and with it a constant for the norm."""
    teacher = tiny_teacher("llama", tmp_path / "t")
    _shift_embeddings(teacher, 1.0)
    ids = tokens(64)
    expected = logits(load(teacher), ids)
    found = {}
    for name, text in (("with", calibration()), ("without", None)):
        out = tmp_path / name
        edit_checkpoint(teacher, out, EditPlan(target="mla"), calibration=text)
        found[name] = divergence(expected, logits(load(out), ids))
    assert found["with"] < 0.7 * found["without"], found


def _shift_embeddings(folder, by: float) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] += by
    save_file(tensors, file, metadata={"format": "pt"})


def test_norms_of_queries_and_keys_are_replaced_by_their_average(tmp_path):
    """Large heads and norm weights of all sizes: without either, scores would be far off."""
    teacher = tiny_teacher("qwen3", tmp_path / "t", num_key_value_heads=1, attention_bias=True)
    tensors = load_file(teacher / "model.safetensors")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    for name in tensors:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            tensors[name] = torch.linspace(0.0, 1.5, 32)[order]
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] *= 4
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    ids = tokens(64)
    expected = logits(load(teacher), ids)
    plan = EditPlan(target="mla", kv_lora_rank=64, qk_rope_head_dim=32)
    edit_checkpoint(teacher, tmp_path / "out", plan, calibration=calibration())
    assert divergence(expected, logits(load(tmp_path / "out"), ids)) < 0.1


def test_a_kept_norm_is_the_teachers(tmp_path):
    """One KV head, its whole width rotated, full rank, and norms that are long or short but weigh
    all elements alike: nothing is left to approximate."""
    teacher = tiny_teacher("qwen3", tmp_path / "t", num_key_value_heads=1)
    tensors = load_file(teacher / "model.safetensors")
    for name in tensors:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            tensors[name].fill_(1.4)
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    ids = tokens(64)
    expected = logits(load(teacher), ids)
    gaps = {}
    for norm in (None, "per_head"):
        plan = EditPlan(target="mla", kv_lora_rank=64, qk_rope_head_dim=32, qk_norm=norm)
        out = tmp_path / str(norm)
        report = edit_checkpoint(teacher, out, plan, calibration=calibration())
        assert report.config.attention_edit.get("qk_norm") == norm
        gaps[norm] = float((logits(load(out), ids) - expected).abs().max())
    assert gaps["per_head"] <= 1e-3 < 0.1 < gaps[None], gaps


@pytest.mark.parametrize(
    ("family", "norm"), [("llama", None), ("qwen2", None), ("qwen3", "per_head")]
)
def test_the_constant_in_the_cache_is_no_longer_than_other_latents(
    teacher_of, tmp_path, family, norm
):
    """A norm needs it a hundred times as long: behind the norm, or without one, that would be a
    hundredfold learning rate, and more than FP8 holds."""
    plan = EditPlan(target="mla", qk_norm=norm)
    edit_checkpoint(teacher_of(family), tmp_path / "out", plan, calibration=calibration())
    with torch.no_grad():
        cache = load(tmp_path / "out")(tokens(256), use_cache=True).past_key_values
    for layer in cache.layers:
        sizes = layer.keys.float().square().mean((0, 1, 2)).sqrt()
        assert 0.2 < sizes[-1] < 3.0 < 2 * sizes.max() < 40.0, sizes


def test_a_norm_that_is_not_there_cannot_be_kept(teacher_of, tmp_path):
    with pytest.raises(AttnEditError, match="--qk-norm: per_head: leave it out: llama has no QK"):
        edit_checkpoint(
            teacher_of("llama"), tmp_path / "out", EditPlan(target="mla", qk_norm="per_head")
        )
    with pytest.raises(AttnEditError, match="--qk-norm: both: use per_head or leave it out"):
        EditPlan(target="mla", qk_norm="both")
    with pytest.raises(AttnEditError, match="--qk-norm: per_head: leave it out or use --target"):
        EditPlan(target="gateswa", qk_norm="per_head")


def test_provenance_tells_what_was_kept_and_on_what_text(teacher_of, tmp_path):
    text = calibration(512)
    report = edit_checkpoint(
        teacher_of("llama"), tmp_path / "out", EditPlan(target="mla"), calibration=text
    )
    provenance = report.config.provenance
    assert provenance["calibration"] == text.describe()
    assert provenance["calibration"]["tokens"] == 512
    assert len(provenance["energy_kept"]["per_layer"]) == 4
    shares = [share for layer in provenance["energy_kept"]["per_layer"] for share in layer]
    assert all(0 < share <= 1 for share in shares)
    stored = load(tmp_path / "out").config
    assert stored.provenance == provenance


def test_float16_and_bfloat16_hold_the_constant_latent(teacher_of, tmp_path):
    for dtype in ("float16", "bfloat16"):
        plan = EditPlan(target="mla", dtype=dtype)
        edit_checkpoint(teacher_of("qwen2"), tmp_path / dtype, plan, calibration=calibration())
        store = SafetensorsStore(tmp_path / dtype)
        assert {info.dtype for info in store.tensors.values()} == {getattr(torch, dtype)}
        assert logits(load(tmp_path / dtype), tokens(16)).isfinite().all()
