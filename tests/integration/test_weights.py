"""Loading is strict: what does not fit the configuration is refused by name, before serving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.engine import engine
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit import AttnEditError
from vllm_attnedit.config import FULL, LATENT, AttentionEdit
from vllm_attnedit.models.causal_lm import check_servable

pytestmark = pytest.mark.integration
Tensors = dict[str, torch.Tensor]


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, torch.zeros(shape))


GATE = "model.layers.1.self_attn.g_proj.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("family", "damage", "message"),
    [
        ("qwen3", drop(GATE), f"{GATE}: missing: "),
        ("qwen3", drop("model.layers.0.self_attn.k_norm.weight"), "k_norm.weight: missing: "),
        ("qwen3", drop("model.layers.0.mlp.up_proj.weight"), "up_proj.weight: missing: "),
        ("qwen3_moe", drop(EXPERT), f"{EXPERT}: missing: "),
        ("qwen3", put("model.layers.0.self_attn.sinks", 4), "sinks: unexpected tensor: "),
        ("llama", put("model.layers.0.self_attn.q_norm.weight", 32), "q_norm.weight: unexpected"),
        ("qwen3", put(GATE, 128, 128), f"{GATE}: shape (128, 128): config.json wants (4, 128)"),
        ("qwen3_moe", put(EXPERT, 32, 128), f"{EXPERT}: shape (32, 128): config.json wants (64,"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    family: str, damage: Callable[[Tensors], None], message: str, tmp_path: Path
):
    folder = tiny_edited_checkpoint(tiny_edited(family), tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AttnEditError) as caught, engine(folder):
        pass
    assert message in str(caught.value)


def test_a_tied_head_stored_twice_is_accepted(tmp_path: Path):
    model = tiny_edited("llama", tie_word_embeddings=True)
    folder = tiny_edited_checkpoint(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with engine(folder):
        pass


def test_what_the_engine_cannot_run_is_refused_with_the_reason():
    model = tiny_edited("llama", tiny_edit("gateswa"))
    with pytest.raises(AttnEditError, match=r"--tensor-parallel-size: 3: use a divisor of the 4"):
        check_servable(model.config, tp_size=3)
    dims = {k: v for k, v in tiny_edit("mla").to_dict().items() if k.endswith(("rank", "dim"))}
    mixed = AttentionEdit(layer_types=(LATENT, LATENT, LATENT, FULL), **dims)
    with pytest.raises(AttnEditError, match=r"use latent_attention in all layers or in none"):
        check_servable(tiny_edited("llama", mixed).config, tp_size=1)
