"""LoRA adapters in the format of peft on edited models, against the reference with them merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from tests.integration.engine import (
    assert_equal,
    engine,
    generate,
    greedy,
    random_prompts,
    reference,
)
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.hf import AttnEditForCausalLM

pytestmark = pytest.mark.integration

RANK, ALPHA, STEPS = 8, 16, 32
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {
    "gateswa": ("q_proj", "k_proj", "v_proj", "o_proj", "g_proj", *MLP),
    "mla": ("q_proj", "kv_a_proj_with_mqa", "o_proj", "g_proj", *MLP),
}


def write_adapter(
    model: AttnEditForCausalLM, targets: tuple[str, ...], folder: Path, seed: int
) -> dict[str, torch.Tensor]:
    """Write a random adapter; returns what it adds to each weight."""
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] not in targets:
            continue
        down = torch.randn(RANK, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
        up = 0.2 * torch.randn(weight.shape[0], RANK, generator=generator)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        deltas[name] = ALPHA / RANK * up @ down
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(targets),
        "bias": "none",
        "base_model_name_or_path": "edited",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@torch.no_grad()
def add(model: AttnEditForCausalLM, deltas: dict[str, torch.Tensor], sign: int) -> None:
    parameters = dict(model.named_parameters())
    for name, delta in deltas.items():
        parameters[name].add_(sign * delta)


@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_two_adapters_in_one_batch(target: str, tmp_path: Path):
    model = tiny_edited("qwen3", tiny_edit(target, gate="headwise"))
    folder = tiny_edited_checkpoint(model, tmp_path / "model")
    names = ("first", "second")
    deltas = {
        name: write_adapter(model, TARGETS[target], tmp_path / name, seed)
        for seed, name in enumerate(names)
    }
    requests = [LoRARequest(n, i + 1, str(tmp_path / n)) for i, n in enumerate(names)]
    prompts = random_prompts([40, 67])
    with engine(folder, enable_lora=True, max_loras=2, max_lora_rank=RANK) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in prompts],
            greedy(STEPS),
            use_tqdm=False,
            lora_request=requests,
        )
        # On CPU vLLM gives requests without an adapter that of another: apart, so far.
        plain = generate(llm, prompts, STEPS)
    for name, prompt, output, unadapted in zip(names, prompts, outputs, plain, strict=True):
        without = reference(model, prompt, STEPS)
        assert_equal(unadapted, without)
        add(model, deltas[name], 1)
        expected = reference(model, prompt, STEPS)
        add(model, deltas[name], -1)
        assert_equal(output, expected)
        assert expected.tokens != without.tokens  # the adapter does something


def test_an_adapter_of_the_latent_expansion_is_refused(tmp_path: Path):
    """Decodes have it folded into queries and outputs, where no adapter could reach it."""
    model = tiny_edited("qwen3", tiny_edit("mla"))
    folder = tiny_edited_checkpoint(model, tmp_path / "model")
    write_adapter(model, ("q_proj", "kv_b_proj"), tmp_path / "adapter", 0)
    request = LoRARequest("bad", 1, str(tmp_path / "adapter"))
    with (
        engine(folder, enable_lora=True, max_lora_rank=RANK) as llm,
        pytest.raises(ValueError, match="kv_b_proj"),
    ):
        llm.llm_engine.add_lora(request)
