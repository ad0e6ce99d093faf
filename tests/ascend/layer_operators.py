"""What vllm-ascend's common layers call, in plain torch; see :mod:`tests.ascend.npu_operators`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ascend.npu_operators import register


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The norm over the last axis, and the inverse root mean square."""
    inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return (x.float() * inverse).to(x.dtype) * gamma, inverse


def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of a sum, the inverse root mean square, and the sum."""
    total = x1 + x2
    return *rms_norm(total, gamma, epsilon), total


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """SiLU of the first half times the second."""
    gate, up = x.chunk(2, dim=dim)
    return F.silu(gate) * up


def rotate_in_place(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin: Tensor, is_neox: bool
) -> None:
    """``_npu_rotary_embedding`` over whole heads; ``query`` and ``key`` are ``(T, heads * D)``."""
    assert is_neox and cos_sin.shape[1] == head_size
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    for x in (query, key):
        heads = x.view(len(x), -1, head_size)
        a, b = heads.chunk(2, dim=-1)
        heads.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))


def install() -> None:
    """Register all, and vllm-ascend's own operators around them."""
    from vllm_ascend.ops.rotary_embedding import rope_forward_oot

    register("npu", "npu_rms_norm", rms_norm)
    register("npu", "npu_add_rms_norm", add_rms_norm)
    register("npu", "npu_swiglu", swiglu)
    register("atb", "_npu_rotary_embedding", rotate_in_place)
    register("vllm", "npu_rotary_embedding", rope_forward_oot)
    register("vllm", "unquantized_gemm", F.linear)
    register("vllm", "maybe_chunk_residual", lambda _, residual: residual)
    register("vllm", "maybe_pad_and_reduce", lambda x, *_, **__: x.clone())
