"""Splits a teacher's rotated keys into one shared RoPE key and keys without position.

MLA rotates one narrow key for all heads (width P) and leaves the per-head keys unrotated
(DeepSeek-V2, arXiv 2405.04434, section 2.1.3), so most of what RoPE did has to be approximated.

Pairs ``(i, i + D/2)`` of a head are complex numbers that RoPE turns by ``exp(1j * position * f)``,
f the pair's frequency: a query at distance d after a key scores ``Re(conj(q) k exp(-1j d f))``.
Multiplying keys by complex weights and adding them over heads commutes with that, so at each
frequency the KV heads can be rotated into principal components (TransMLA, arXiv 2502.07864, does it
with real weights). The first becomes the shared key, exact up to what the other components held.
Those remain as keys without position: the turn is replaced by its mean, ``E_d[exp(-1j d f)]``, on
the query's side.

Shapes: H query heads, G KV heads, D head width, I inputs, P qk_rope_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 128
"""Distances of unknown weight are spread evenly on a log scale up to here: attention is mostly
local, and the turns of farther keys average to nothing anyway."""


def to_pairs(rows: Tensor) -> Tensor:
    """(heads, D, I) real rows as (heads, D/2, I) complex ones."""
    half = rows.shape[1] // 2
    return torch.complex(rows[:, :half], rows[:, half:])


def from_pairs(pairs: Tensor) -> Tensor:
    """Inverse of :func:`to_pairs`."""
    return torch.cat([pairs.real, pairs.imag], dim=1)


def nearest_pairs(frequencies: Tensor, wanted: Tensor) -> list[int]:
    """For each wanted frequency the teacher's pair with the nearest one, each pair used once.

    With a standard RoPE and P a divisor of D these are exactly the teacher's at stride D / P.
    """
    chosen: list[int] = []
    for frequency in wanted:
        distance = (frequencies.log() - frequency.log()).abs()
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
    return chosen


def mean_turn(frequencies: Tensor, distances: Tensor | None, heads: int) -> Tensor:
    """``E_d[exp(-1j d f)]`` of each head and frequency, (H, D/2) complex.

    Args:
        frequencies: (D/2,), radians a token.
        distances: (H, T) how much each head attends at each distance, if known: such a head's own
            habits count for half.
        heads: H.
    """
    spread = torch.logspace(0, torch.tensor(float(NEAR)).log10().item(), 256, dtype=torch.float64)
    prior = torch.exp(-1j * spread[:, None] * frequencies).mean(0).expand(heads, -1)
    if distances is None:
        return prior
    steps = torch.arange(distances.shape[1], dtype=torch.float64)
    share = distances / distances.sum(1, keepdim=True).clamp_min(1e-30)
    seen = share.to(torch.complex128) @ torch.exp(-1j * steps[:, None] * frequencies)
    return (seen + prior) / 2


def _apply(rows: Tensor, moment: Tensor) -> Tensor:
    """``rows @ moment`` of complex rows, without a complex copy of the moment."""
    return torch.complex(rows.real @ moment, rows.imag @ moment)


@dataclass(frozen=True)
class RopeSplit:
    """Queries and keys of an MLA layer that score as the teacher's do.

    Attributes:
        q_rope: (H, P, I).
        k_rope: (P, I), shared by all heads.
        q_nope: (H, D, I).
        k_nope: (G, D, I), what the shared key does not carry.
    """

    q_rope: Tensor
    k_rope: Tensor
    q_nope: Tensor
    k_nope: Tensor


def split_rope(
    query: Tensor,
    key: Tensor,
    *,
    query_moment: Tensor,
    key_moment: Tensor,
    chosen: list[int],
    turn: Tensor,
) -> RopeSplit:
    """Split a teacher's queries (H, D, I) and keys (G, D, I), float64.

    Args:
        query: rows of the query projection by head.
        key: rows of the key projection by KV head.
        query_moment: (I, I) second moment of inputs as queries see them.
        key_moment: the same for keys.
        chosen: for each of P/2 frequencies, the teacher's pair that has it.
        turn: (H, D/2) complex, what replaces the rotation where there is none.
    """
    heads, groups = query.shape[0], key.shape[0]
    repeat = heads // groups
    q_pairs, k_pairs = to_pairs(query), to_pairs(key)
    rest = k_pairs.clone()
    q_rope, k_rope = [], []
    for pair in chosen:
        q_rows, k_rows = q_pairs[:, pair], k_pairs[:, pair]  # (H, I), (G, I)
        # An error in a key matters as much as the queries that look at it.
        energy = (_apply(q_rows, query_moment) * q_rows.conj()).real.sum(1)
        energy = energy.view(groups, repeat).sum(1)
        weight = energy.clamp_min(1e-30).sqrt()[:, None]
        # Relative ones, so that shared keys are as long as keys were: a norm may follow.
        weight = weight / weight.square().mean().sqrt()
        weighted = weight * k_rows
        direction = torch.linalg.eigh(_apply(weighted, key_moment) @ weighted.mH)[1][
            :, -1:
        ]  # (G, 1)
        shared = (direction.conj() * weighted).sum(0)
        share = direction / weight
        rest[:, pair] = k_rows - share * shared
        k_rope.append(shared)
        q_rope.append(share.conj().repeat_interleave(repeat, 0) * q_rows)
    # Queries where no key is left to meet would only lengthen what a norm sees.
    left, whole = (
        (_apply(k.flatten(0, 1), key_moment) * k.flatten(0, 1).conj()).real.sum(1)
        for k in (rest, k_pairs)
    )
    met = (left > 1e-12 * whole).view(groups, -1).any(0)  # (D/2,)
    turn = turn * met
    return RopeSplit(
        q_rope=from_pairs(torch.stack(q_rope, 1)),
        k_rope=from_pairs(torch.stack(k_rope)[None])[0],
        q_nope=from_pairs(turn.conj()[:, :, None] * q_pairs),
        k_nope=from_pairs(rest),
    )
