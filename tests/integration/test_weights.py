"""Loading is strict: what does not fit the configuration is refused by name, before serving."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.integration.engine import engine
from tests.unit.quantised import quantised_checkpoint
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit import AttnEditError
from vllm_attnedit.config import FULL, LATENT, AttentionEdit
from vllm_attnedit.models.causal_lm import check_servable
from vllm_attnedit.models.weights import WeightLoader

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


@pytest.mark.parametrize(
    ("family", "method", "name"),
    [
        ("qwen3", "gptq", "model.layers.0.self_attn.k_proj.weight"),
        ("qwen3", "gptq", "model.layers.1.mlp.down_proj.qweight"),
        ("qwen3", "awq", "model.layers.1.mlp.up_proj.scales"),
    ],
)
def test_a_quantised_checkpoint_must_be_whole_too(
    family: str, method: str, name: str, tmp_path: Path
):
    folder = quantised_checkpoint(tiny_edited(family), method, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AttnEditError) as caught, engine(folder, dtype="bfloat16"):
        pass
    assert f"{name}: missing: " in str(caught.value)


def test_experts_that_other_ranks_have_need_not_come():
    """vLLM can leave them out of a rank's stream; but what the rank holds, here the second of two,
    must be whole."""
    config = tiny_edited("qwen3_moe").config
    mlp, held = nn.Module(), config.num_experts // 2
    mine = range(held, config.num_experts)
    mlp.experts = nn.Module()
    for name, width in (("w13_weight", 2), ("w2_weight", 1)):
        parameter = nn.Parameter(torch.zeros(held, width), requires_grad=False)
        parameter.weight_loader = lambda *_, expert_id, **__: expert_id in mine  # type: ignore[attr-defined]
        mlp.experts.register_parameter(name, parameter)
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Module()])
    model.model.layers[0].mlp = mlp

    def load(left_out: str, experts: range) -> None:
        loader = WeightLoader(model, config, quantized=False)
        loader.expected = {n: s for n, s in loader.expected.items() if "layers.0.mlp.experts" in n}
        wanted = {n for n in loader.expected if int(n.split(".")[5]) in experts} - {left_out}
        loader.load((name, torch.zeros(loader.expected[name])) for name in wanted)

    name = f"model.layers.0.mlp.experts.{held}.up_proj.weight"
    load("", mine)
    load("", range(config.num_experts))
    with pytest.raises(AttnEditError, match=f"^{re.escape(name)}: missing: "):
        load(name, range(config.num_experts))
    with pytest.raises(AttnEditError, match=rf"w13_weight, w3 of 1 of its {held} experts: missing"):
        load(name, mine)


def test_graphs_are_cached_by_how_layers_are_served(tmp_path: Path):
    """Two ways to serve one checkpoint, which vLLM's own hash cannot tell apart."""
    folder = tiny_edited_checkpoint(tiny_edited("qwen3"), tmp_path)
    noted = []
    for options in ({}, {}, {"disable_hybrid_kv_cache_manager": True}):
        with engine(folder, **options) as llm:
            config = llm.llm_engine.vllm_config
            noted.append(dict(config.additional_config))
            before = config.compute_hash()
            config.additional_config.update(noted[0])
            assert (config.compute_hash() == before) == (not options)
    assert noted[0] == noted[1] != noted[2]


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
