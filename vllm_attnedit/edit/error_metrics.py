"""Errors of keys and values, measured where they matter.

A key error matters by the scores that it changes, so by the queries that look at it; a value error
by what ``o_proj`` makes of it. Either is a metric (D, D) of each KV head, under whose square root
rows are factorised as if every error counted alike.

Shapes: H query heads, G KV heads, D the teacher's head width, I inputs, E hidden, R kv_lora_rank,
C qk_nope_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_attnedit.edit.lowrank import Factors, SecondMoment, weighting


def query_metric(q_nope: Tensor, groups: int, moment: SecondMoment) -> Tensor:
    """(G, D, D): mean square score that a key error causes in the heads that share it."""
    gram = q_nope @ moment.matrix @ q_nope.mT  # (H, D, D)
    return gram.unflatten(0, (groups, -1)).sum(1)


def output_metric(output: Tensor, heads: int, groups: int) -> Tensor:
    """(G, D, D): squared output error that a value error causes; ``output`` is (E, H * D)."""
    per_head = output.unflatten(1, (heads, -1)).permute(1, 0, 2)  # (H, E, D)
    return (per_head.mT @ per_head).unflatten(0, (groups, -1)).sum(1)


class MeasuredRows:
    """Keys or values of all KV heads, measured under each head's metric, scaled to energy 1.

    Args:
        rows: ``(G, D, I)``, in the teacher's units.
        metric: ``(G, D, D)``.
        moment: of the inputs.

    Attributes:
        rows: ``(G * D, I)``, measured and scaled.
    """

    def __init__(self, rows: Tensor, metric: Tensor, moment: SecondMoment) -> None:
        self._groups, self._width, _ = rows.shape  # (G, D, I)
        roots = [weighting(m) for m in metric]
        self._inverse = torch.stack([inverse for _, inverse in roots])
        measured = torch.stack([root for root, _ in roots]) @ rows
        energy = moment.energy(measured)
        # One KV head at full RoPE width leaves no keys to the latent, but rounding errors.
        negligible = moment.energy(rows) < 1e-20
        self._scale = 0.0 if negligible else energy**-0.5
        self.rows = (measured * self._scale).flatten(0, 1)

    def restore(self, expand: Tensor) -> Tensor:
        """(G, D, R) in the teacher's own units, from (G * D, R)."""
        if not self._scale:
            return torch.zeros(self._groups, self._width, expand.shape[1], dtype=expand.dtype)
        return self._inverse @ expand.view(self._groups, self._width, -1) / self._scale


def fit_width(
    q_nope: Tensor,
    k_expand: Tensor,
    width: int,
    metric: Tensor,
    factors: Factors,
    moment: SecondMoment,
) -> tuple[Tensor, Tensor]:
    """Queries (H, D, I) and key expansion (G, D, R) at another width C: padded, or the C directions
    of each KV head that carry most of its scores."""
    head_dim = q_nope.shape[1]
    if width >= head_dim:
        pad = (0, 0, 0, width - head_dim)
        return torch.nn.functional.pad(q_nope, pad), torch.nn.functional.pad(k_expand, pad)
    reduced = factors.reduce
    latent = reduced @ moment.matrix @ reduced.T
    queries, keys = [], []
    by_group = q_nope.unflatten(0, (len(k_expand), -1))
    for rows, expand, gram in zip(by_group, k_expand, metric):
        root, inverse = weighting(gram)
        vectors = torch.linalg.eigh(root @ expand @ latent @ expand.T @ root)[1][:, -width:]
        keys.append(vectors.T @ root @ expand)
        queries.append(vectors.T @ inverse @ rows)
    return torch.cat(queries), torch.stack(keys)
