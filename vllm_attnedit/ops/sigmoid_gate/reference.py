"""Oracle: attention output times the sigmoid of the gate's logits."""

from __future__ import annotations

import torch
from torch import Tensor


def gated(attn: Tensor, gate: Tensor) -> Tensor:
    """The formula, for any leading axes; differentiable and traceable.

    Args:
        attn: ``(..., N, D)``.
        gate: logits, ``(..., N)`` or ``(..., N * D)``.

    Returns:
        ``(..., N, D)`` in the dtype of ``attn``, the product formed in float32, or float64 if
        ``attn`` is.
    """
    wide = torch.promote_types(attn.dtype, torch.float32)
    # Head-wise logits become (..., N, 1), element-wise ones (..., N, D).
    weight = torch.sigmoid(gate.to(wide)).unflatten(-1, (attn.shape[-2], -1))
    return (attn.to(wide) * weight).to(attn.dtype)


def sigmoid_gate(attn: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """``out = gated(attn, gate)``.

    Args:
        attn: ``(T, N, D)``.
        gate: logits, ``(T, N)`` or ``(T, N * D)``.
        out: ``(T, N, D)``; may be ``attn``.
    """
    return out.copy_(gated(attn, gate))
