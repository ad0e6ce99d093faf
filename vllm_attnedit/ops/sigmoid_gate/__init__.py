"""Attention output times the sigmoid of the gate, for backends that cannot fuse it.

Shapes: T tokens, N heads, D head width.
"""

from __future__ import annotations

from torch import Tensor

from vllm_attnedit.ops import checks
from vllm_attnedit.ops.dispatch import implementation

__all__ = ["sigmoid_gate"]


def sigmoid_gate(attn: Tensor, gate: Tensor, out: Tensor | None = None) -> Tensor:
    """``attn * sigmoid(gate)``, the product in float32.

    Args:
        attn: ``(T, N, D)`` bfloat16, float16 or float32, any strides but a contiguous last axis.
        gate: logits, head-wise ``(T, N)`` or element-wise ``(T, N * D)``.
        out: ``(T, N, D)`` like ``attn``, which it may be; None for a new one.

    Returns:
        ``out``.

    Raises:
        AttnEditError: an argument that no kernel takes; names it, its value and what to pass.
    """
    checks.check_query(attn, field="attn")
    checks.require(gate is not None, "gate", gate, "pass logits")
    checks.check_gate(gate, attn, attn.shape[2])
    out = checks.prepare_out(out, tuple(attn.shape), attn)
    if attn.numel() == 0:
        return out
    result: Tensor = implementation("sigmoid_gate", attn.device).sigmoid_gate(attn, gate, out)
    return result
