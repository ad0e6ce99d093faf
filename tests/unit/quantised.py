"""Edited checkpoints whose MLPs are quantised, written as their tools write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.tiny_edited import tiny_edited_checkpoint
from vllm_attnedit.hf import AttnEditForCausalLM

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "dynamic": {"-:.*self_attn.*": {}},
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["self_attn", "lm_head"],
    },
    "fp8": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": [],  # filled in: it takes full names only
    },
}


def pack(values: Tensor, axis: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight 4-bit integers to an int32 along ``axis``, value ``order[i]`` in nibble i."""
    moved = values.movedim(axis, -1).unflatten(-1, (-1, 8)).long()
    packed = sum(moved[..., source] << (4 * place) for place, source in enumerate(order))
    assert isinstance(packed, Tensor)
    return packed.to(torch.int32).movedim(-1, axis).contiguous()


def quantise(weight: Tensor, method: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a linear layer by suffix, and the (out, in) weight that they stand for."""
    if method == "fp8":
        scale = weight.abs().max() / 448
        rounded = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": rounded, "weight_scale": scale}, rounded.float() * scale
    rows = weight.T.unflatten(0, (-1, GROUP))  # (groups, GROUP, out)
    if method == "gptq":
        scales = (rows.abs().amax(1) / 7).to(dtype)
        zeros = torch.full_like(scales, 8)
    else:
        low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
        scales = ((high - low) / 15).to(dtype)
        zeros = (-low / scales.float()).round().clamp(0, 15).to(dtype)
    wide = scales.float()[:, None]
    codes = (rows / wide + zeros.float()[:, None]).round().clamp(0, 15)
    stands_for = ((codes - zeros.float()[:, None]) * wide).flatten(0, 1).T.contiguous()
    codes = codes.flatten(0, 1)  # (in, out)
    if method == "gptq":
        tensors = {
            "qweight": pack(codes, 0),
            "qzeros": pack(zeros - 1, 1),  # as the format's first version stores them
            "scales": scales,
            "g_idx": torch.arange(len(codes), dtype=torch.int32) // GROUP,
        }
    else:
        tensors = {
            "qweight": pack(codes, 1, AWQ_ORDER),
            "qzeros": pack(zeros, 1, AWQ_ORDER),
            "scales": scales,
        }
    return tensors, stands_for


@torch.no_grad()
def quantised_checkpoint(
    model: AttnEditForCausalLM, method: str, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write ``model`` with 4-bit or FP8 MLPs, and give it the weights that they stand for."""
    tiny_edited_checkpoint(model.to(dtype), folder)
    model.float()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    parameters = dict(model.named_parameters())
    for name in [n for n in tensors if ".mlp." in n]:
        made, stands_for = quantise(tensors.pop(name).float(), method, dtype)
        tensors |= {f"{name.removesuffix('.weight')}.{k}": v for k, v in made.items()}
        parameters[name].copy_(stands_for)
    save_file(tensors, file, metadata={"format": "pt"})
    quantisation = dict(CONFIGS[method])
    if "ignored_layers" in quantisation:
        kept = [n.removesuffix(".weight") for n in tensors if "self_attn" in n or "lm_head" in n]
        quantisation["ignored_layers"] = kept
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    return folder
