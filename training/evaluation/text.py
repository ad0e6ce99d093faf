"""Perplexity of a text at several context lengths, and agreement with the teacher on it.

A text is cut into windows of one length, without overlap; every token but a window's first counts.

Shapes: W windows, T tokens, E hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from training.evaluation.intervals import Estimate, exponential, mean_of
from training.kl import divergence, logits_of
from vllm_attnedit.hf import AttnEditForCausalLM

_CHUNK = 2048
"""Positions whose logits exist at once."""
_FIRST_RANGE = 128
"""Tokens seen, of the first of :func:`position_ranges`."""


def _hidden(model: AttnEditForCausalLM, ids: Tensor) -> Tensor:
    """Last hidden states at all positions but the last, (rows, T - 1, E)."""
    states: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return states[:, :-1]


def _batches(ids: Tensor, tokens: int) -> Iterator[Tensor]:
    """Groups of windows with about so many tokens in all."""
    yield from ids.split(max(1, tokens // ids.shape[1]))


@torch.no_grad()
def window_losses(model: AttnEditForCausalLM, ids: Tensor, tokens: int = 1 << 15) -> list[float]:
    """Mean loss in nats a token of every window.

    Args:
        model: on its device.
        ids: windows (W, T).
        tokens: of one forward pass.
    """
    head, found = model.lm_head.weight, []
    for rows in _batches(ids, tokens):
        on_device = rows.to(head.device)
        hidden = _hidden(model, on_device)
        for states, wanted in zip(hidden, on_device[:, 1:]):
            parts = [
                functional.cross_entropy(logits_of(h, head, fp32=True), w, reduction="sum")
                for h, w in zip(states.split(_CHUNK), wanted.split(_CHUNK))
            ]
            found.append(torch.stack(parts).sum().item() / len(wanted))
    return found


def perplexity(model: AttnEditForCausalLM, ids: Tensor) -> Estimate:
    """Perplexity with an interval over windows."""
    return exponential(mean_of(window_losses(model, ids)))


def position_ranges(length: int) -> list[tuple[int, int]]:
    """Doubling ranges of the number of tokens that a prediction has seen, first and last.

    ``length`` is that of a window: its predictions have seen 1 to ``length - 1`` tokens.
    """
    ends = [_FIRST_RANGE]
    while ends[-1] < length - 1:
        ends.append(2 * ends[-1])
    starts = [0, *ends[:-1]]
    return [(start + 1, min(end, length - 1)) for start, end in zip(starts, ends)]


@torch.no_grad()
def agreement(
    model: AttnEditForCausalLM, teacher: AttnEditForCausalLM, ids: Tensor, tokens: int = 1 << 15
) -> tuple[dict[str, Estimate], dict[tuple[int, int], Estimate]]:
    """How a model's next-token distributions compare with the teacher's; intervals over windows.

    Returns:
        ``top1``: share of positions with the same likeliest token; ``kl``: mean KL(teacher ||
        model) in nats.
        By :func:`position_ranges`: the model's loss less the teacher's, in nats a token. It tells
        what a window or a short training length costs from what training cost everywhere.
    """
    same: list[float] = []
    distance: list[float] = []
    ranges = position_ranges(ids.shape[1])
    above: dict[tuple[int, int], list[float]] = {each: [] for each in ranges}
    for rows in _batches(ids, tokens):
        on_device = rows.to(model.lm_head.weight.device)
        states = zip(_hidden(model, on_device), _hidden(teacher, on_device), on_device[:, 1:])
        for mine, theirs, wanted in states:
            hits, total = 0.0, 0.0
            losses = []
            for a, b, w in zip(mine.split(_CHUNK), theirs.split(_CHUNK), wanted.split(_CHUNK)):
                student = logits_of(a, model.lm_head.weight, fp32=True)
                target = logits_of(b, teacher.lm_head.weight, fp32=True)
                hits += (student.argmax(-1) == target.argmax(-1)).sum().item()
                total += divergence(student, target).sum().item()
                both = [functional.cross_entropy(x, w, reduction="none") for x in (student, target)]
                losses.append(both[0] - both[1])
            same.append(hits / len(mine))
            distance.append(total / len(mine))
            gap = torch.cat(losses)
            for first, last in ranges:
                above[first, last].append(gap[first - 1 : last].mean().item())
    by_position = {each: mean_of(values) for each, values in above.items()}
    return {"top1": mean_of(same), "kl": mean_of(distance)}, by_position
