"""What a quantised checkpoint must hold, against the parameters that vLLM's own methods make."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQMoEMethod
from vllm.model_executor.layers.quantization.awq_marlin import AWQMarlinMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16,
)

from tests.unit.tiny_edited import tiny_edited
from vllm_attnedit import AttnEditError
from vllm_attnedit.models.weights import WeightLoader

CONFIG = tiny_edited("qwen3_moe").config
EXPERTS = CONFIG.num_experts
PREFIX = "model.layers.0.mlp.experts"
WNA16 = compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod
METHODS: dict[str, tuple[Any, SimpleNamespace, tuple[str, ...]]] = {
    "gptq": (
        AutoGPTQMoEMethod,
        SimpleNamespace(
            input_dtype=None,
            quant_config=SimpleNamespace(
                group_size=32,
                desc_act=False,
                pack_factor=8,
                quant_type=SimpleNamespace(size_bits=4),
            ),
        ),
        ("qweight", "qzeros", "scales"),
    ),
    "awq": (
        AWQMarlinMoEMethod,
        SimpleNamespace(
            input_dtype=None, quant_config=SimpleNamespace(group_size=32, pack_factor=8)
        ),
        ("qweight", "qzeros", "scales"),
    ),
    "compressed-tensors": (
        WNA16,
        SimpleNamespace(
            packed_factor=8,
            num_bits=4,
            group_size=32,
            strategy="group",
            moe=SimpleNamespace(is_act_and_mul=True),
        ),
        ("weight_packed", "weight_scale", "weight_shape"),
    ),
}


def experts_of(method: str) -> nn.Module:
    """A model of one layer whose experts have what the method makes."""
    cls, settings, _ = METHODS[method]
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Module()])
    model.model.layers[0].mlp = nn.Module()
    experts = model.model.layers[0].mlp.experts = nn.Module()
    cls.create_weights(
        settings,
        experts,
        EXPERTS,
        128,
        64,
        torch.bfloat16,
        intermediate_size_full=64,
        weight_loader=lambda *_, **__: True,
    )
    for parameter in experts.parameters():
        parameter.weight_loader = lambda *_, **__: True  # type: ignore[attr-defined]
    return model


def load(model: nn.Module, names: list[str]) -> None:
    loader = WeightLoader(model, CONFIG, quantized=True)
    loader.expected = {}
    loader.load((name, torch.zeros(1)) for name in names)


@pytest.mark.parametrize("method", METHODS)
def test_experts_of_a_whole_checkpoint_are_enough(method: str) -> None:
    """Methods keep room for what no checkpoint has, an order of groups for instance."""
    model, (_, _, suffixes) = experts_of(method), METHODS[method]
    names = [
        f"{PREFIX}.{expert}.{part}.{suffix}"
        for expert in range(EXPERTS)
        for part in ("gate_proj", "up_proj", "down_proj")
        for suffix in suffixes
    ]
    load(model, names)
    for lost in (names[0], names[-1], f"{PREFIX}.1.up_proj.{suffixes[1]}"):
        with pytest.raises(AttnEditError) as caught:
            load(model, [name for name in names if name != lost])
        assert str(caught.value).startswith(f"{lost}: missing: ")


def test_scales_of_weights_must_come_others_need_not() -> None:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Module()])
    attention = model.model.layers[0].self_attn = nn.Module()
    attention.qkv_proj, attention.attn = nn.Module(), nn.Module()
    for module, name in (
        (attention.qkv_proj, "weight"),
        (attention.qkv_proj, "weight_scale"),
        (attention.qkv_proj, "input_scale"),
        (attention.attn, "k_scale"),
    ):
        parameter = nn.Parameter(torch.zeros(3), requires_grad=False)
        parameter.weight_loader = lambda *_: None  # type: ignore[attr-defined]
        module.register_parameter(name, parameter)
    prefix = "model.layers.0.self_attn"
    names = [f"{prefix}.{p}_proj.{s}" for p in "qkv" for s in ("weight", "weight_scale")]
    load(model, names)
    with pytest.raises(AttnEditError, match=r"self_attn\.v_proj\.weight_scale: missing: "):
        load(model, names[:-1])
