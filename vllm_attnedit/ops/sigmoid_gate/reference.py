"""Oracle: attention output times the sigmoid of the gate's logits."""

from __future__ import annotations

import torch
from torch import Tensor


def sigmoid_gate(attn: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """``out = attn * sigmoid(gate)``; the product is formed in float32, or float64 if ``attn`` is.

    Args:
        attn: ``(T, N, D)``.
        gate: logits, ``(T, N)`` or ``(T, N * D)``.
        out: ``(T, N, D)``; may be ``attn``.
    """
    wide = torch.promote_types(attn.dtype, torch.float32)
    tokens, heads, _ = attn.shape
    # Head-wise logits become (T, N, 1), element-wise ones (T, N, D).
    weight = torch.sigmoid(gate.to(wide)).reshape(tokens, heads, -1)
    out.copy_(attn.to(wide) * weight)
    return out
