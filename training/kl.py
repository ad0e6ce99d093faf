"""Forward KL between next-token distributions, without ever holding the logits of a whole batch.

``KL(teacher || student)`` at temperature 1, summed over positions with weights. :func:`plain_kl`
writes it down; :func:`chunked_kl` computes the same value and gradient from hidden states and
output heads, a few thousand positions at a time, and :class:`TopK` targets stand in for the
teacher's logits.

The chunked form has the logits of a chunk in its hands once, in the forward pass, and forms the
gradient with respect to the hidden states right there: softmax(student) - softmax(teacher), times
the head. Kept are (N, E) gradients, not (N, V) logits.

Shapes: N positions, C positions of a chunk, E hidden, V vocabulary, J kept tokens of a top-k
    teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_ALL = 1 - 1e-7


@dataclass(frozen=True)
class Dense:
    """The teacher as hidden states (N, E) and its output head (V, E)."""

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class TopK:
    """The teacher's likeliest tokens ``ids`` (N, J) and their log probabilities ``logp`` (N, J).

    All other tokens together are one more outcome, so the divergence is a proper one, never more
    than the full one, and equal to it for J = V.
    """

    logp: Tensor
    ids: Tensor


Target = Dense | TopK


def logits_of(hidden: Tensor, head: Tensor, fp32: bool = False) -> Tensor:
    """Logits (N, V) in float32; ``fp32`` keeps what a product in bfloat16 would round away."""
    if fp32:
        if hidden.is_cuda and hidden.dtype == head.dtype == torch.bfloat16:
            return torch.mm(hidden, head.t(), out_dtype=torch.float32)
        return hidden.float() @ head.float().t()
    return (hidden @ head.t()).float()


def top_k(hidden: Tensor, head: Tensor, k: int, fp32: bool = False) -> TopK:
    """The teacher's ``k`` likeliest tokens at every position."""
    logp = functional.log_softmax(logits_of(hidden, head, fp32), dim=-1)
    values, ids = logp.topk(min(k, logp.shape[-1]), dim=-1)
    return TopK(values, ids)


def _log_rest(logp: Tensor) -> Tensor:
    """log(1 - sum(exp(logp))) over the last axis, at least log(1e-7): float32 knows no better."""
    return torch.log1p(-logp.exp().sum(-1).clamp(max=_ALL))


def divergence(student: Tensor, target: Tensor | TopK) -> Tensor:
    """KL(teacher || student) by position, (N,) float32.

    Args:
        student: logits (N, V) float32.
        target: teacher logits (N, V) float32, or its top-k.
    """
    logq = functional.log_softmax(student, dim=-1)
    if isinstance(target, TopK):
        logp, logq = target.logp.float(), logq.gather(-1, target.ids)
        rest_p = _log_rest(logp)
        kept = (logp.exp() * (logp - logq)).sum(-1)
        if logp.shape[-1] == student.shape[-1]:
            return kept
        return kept + rest_p.exp() * (rest_p - _log_rest(logq))
    logp = functional.log_softmax(target, dim=-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def plain_kl(
    hidden: Tensor, head: Tensor, target: Target, weight: Tensor, fp32_logits: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss written down: the oracle of :func:`chunked_kl`, with its arguments and results."""
    student = logits_of(hidden, head, fp32_logits)
    if isinstance(target, Dense):
        teacher = logits_of(target.hidden, target.head, fp32_logits)
        loss, best = divergence(student, teacher), teacher.argmax(-1)
    else:
        loss, best = divergence(student, target), target.ids[:, 0]
    agreed = (student.detach().argmax(-1) == best) * weight
    return (loss * weight).sum(), agreed.sum()


def _dense_chunk(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weight: Tensor,
    fp32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, agreements and d loss / d logits (C, V) of a chunk."""
    student = logits_of(hidden, head, fp32)
    teacher = logits_of(teacher_hidden, teacher_head, fp32)
    logq = functional.log_softmax(student, dim=-1)
    logp = functional.log_softmax(teacher, dim=-1)
    p = logp.exp()
    loss = ((p * (logp - logq)).sum(-1) * weight).sum()
    agreed = ((student.argmax(-1) == teacher.argmax(-1)) * weight).sum()
    return loss, agreed, ((logq.exp() - p) * weight[:, None]).to(hidden.dtype)


def _topk_chunk(
    hidden: Tensor, head: Tensor, logp: Tensor, ids: Tensor, weight: Tensor, fp32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_dense_chunk`. Derivation: with q the softmax, R = 1 - sum of kept q and r the
    teacher's rest, d/dz = -p_j at kept j, + q_i sum(p) everywhere, and for the rest term
    r/R (q_j - q_j sum(kept q)) at kept j, - r/R q_i sum(kept q) elsewhere.
    """
    student = logits_of(hidden, head, fp32)
    logq = functional.log_softmax(student, dim=-1)
    logp = logp.float()
    p, kept_logq = logp.exp(), logq.gather(-1, ids)
    loss = (p * (logp - kept_logq)).sum(-1)
    gradient = logq.exp() * p.sum(-1, keepdim=True)
    spread = -p
    if ids.shape[-1] < student.shape[-1]:
        log_r, log_rest = _log_rest(logp), _log_rest(kept_logq)
        r = log_r.exp()
        loss = loss + r * (log_r - log_rest)
        # Where the student's rest is clamped, its term is a constant.
        kept_q = kept_logq.exp()
        free = kept_q.sum(-1) < _ALL
        ratio = torch.where(free, r / log_rest.exp(), torch.zeros_like(r))[:, None]
        gradient = gradient - logq.exp() * ratio * kept_q.sum(-1, keepdim=True)
        spread = spread + ratio * kept_q
    gradient = gradient.scatter_add(-1, ids, spread)
    agreed = ((student.argmax(-1) == ids[:, 0]) * weight).sum()
    return (loss * weight).sum(), agreed, (gradient * weight[:, None]).to(hidden.dtype)


_compiled: dict[str, Callable[..., Any]] = {}


def _body(dense: bool, compiled: bool) -> Callable[..., Any]:
    function: Callable[..., Any] = _dense_chunk if dense else _topk_chunk
    if not compiled:
        return function
    if function.__name__ not in _compiled:
        _compiled[function.__name__] = torch.compile(function, dynamic=False)
    return _compiled[function.__name__]


class _ChunkedKL(torch.autograd.Function):
    """Loss and agreements over chunks; the gradient is formed on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        target: Target,
        weight: Tensor,
        options: tuple[int, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        chunk, fp32, compiled = options
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        dense = isinstance(target, Dense)
        body = _body(dense, compiled)
        if isinstance(target, Dense):
            first, second = target.hidden, target.head
        else:
            first, second = target.logp, target.ids
        cast = head.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        agreed = torch.zeros_like(loss)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        head_grad = (
            torch.zeros(head.shape, dtype=torch.float32, device=head.device) if needs_head else None
        )
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                other = second if dense else second[part]
                one, same, gradient = body(
                    hidden[part], cast, first[part], other, weight[part], fp32
                )
                loss += one
                agreed += same
                if hidden_grad is not None:
                    torch.mm(gradient, cast, out=hidden_grad[part])
                if head_grad is not None:
                    head_grad += gradient.t().float() @ hidden[part].float()
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(agreed)
        return loss, agreed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (loss_grad, _) = gradients
        hidden_grad, head_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * loss_grad,
            None if head_grad is None else (head_grad * loss_grad).to(ctx.head_dtype),
            None,
            None,
            None,
        )


def chunked_kl(
    hidden: Tensor,
    head: Tensor,
    target: Target,
    weight: Tensor,
    *,
    chunk: int,
    fp32_logits: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of KL(teacher || student) over positions.

    Args:
        hidden: the student's last hidden states (N, E); gradients flow here.
        head: its output head (V, E); gradients flow here if it is trained.
        target: the teacher.
        weight: of each position (N,) float32.
        chunk: positions whose logits exist at once.
        fp32_logits: keep logits of bf16 states in float32.
        compiled: compile the body; then give N as a multiple of ``chunk``.

    Returns:
        The loss in nats, a scalar, and the weighted number of positions at which both models rank
        the same token first (no gradient).
    """
    loss, agreed = _ChunkedKL.apply(hidden, head, target, weight, (chunk, fp32_logits, compiled))
    return loss, agreed
