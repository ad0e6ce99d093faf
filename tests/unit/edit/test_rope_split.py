"""The split of RoPE: exact where one head's pairs are all rotated, best in the mean elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_attnedit.edit.rope_split import (
    from_pairs,
    mean_turn,
    nearest_pairs,
    split_rope,
    to_pairs,
)

HEADS, GROUPS, WIDTH, INPUTS = 4, 2, 8, 12
FREQUENCIES = 100.0 ** (-torch.arange(WIDTH // 2).double() / (WIDTH // 2))


def rotate(rows: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """Half-rotation RoPE of vectors (..., 2F), written out with cos and sin."""
    first, second = rows.chunk(2, -1)
    cos, sin = torch.cos(position * frequencies), torch.sin(position * frequencies)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(query: Tensor, key: Tensor, chosen: list[int], turn: Tensor | None = None):
    moment = random(INPUTS, INPUTS, seed=9)
    moment = moment @ moment.T
    if turn is None:
        turn = mean_turn(FREQUENCIES, None, len(query))
    return split_rope(query, key, query_moment=moment, key_moment=moment, chosen=chosen, turn=turn)


def test_pairs_rotate_as_complex_numbers():
    rows = random(1, WIDTH, 1)
    turned = to_pairs(rows) * torch.exp(1j * 3 * FREQUENCIES)[None, :, None]
    assert torch.allclose(from_pairs(turned)[0, :, 0], rotate(rows[0, :, 0], 3, FREQUENCIES))


@pytest.mark.parametrize("distance", [0, 1, 7, 100])
def test_one_kv_head_at_full_width_scores_exactly(distance):
    query, key = random(HEADS, WIDTH, INPUTS), random(1, WIDTH, INPUTS, seed=1)
    result = split(query, key, [0, 1, 2, 3])
    x, y = random(INPUTS, seed=2), random(INPUTS, seed=3)
    assert result.k_nope.abs().max() < 1e-9
    shared = rotate(result.k_rope @ y, 5, FREQUENCIES)
    for head in range(HEADS):
        expected = rotate(query[head] @ x, 5 + distance, FREQUENCIES) @ rotate(
            key[0] @ y, 5, FREQUENCIES
        )
        score = rotate(result.q_rope[head] @ x, 5 + distance, FREQUENCIES) @ shared
        assert score == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("distance", [0, 3, 40])
def test_at_the_distance_of_the_turn_nothing_is_lost(distance):
    """Rotated and unrotated parts add up to the teacher's score where the turn is no mean."""
    query, key = random(HEADS, WIDTH, INPUTS), random(GROUPS, WIDTH, INPUTS, seed=1)
    turn = torch.exp(-1j * distance * FREQUENCIES).expand(HEADS, -1)
    result = split(query, key, [0, 2], turn)
    x, y = random(INPUTS, seed=2), random(INPUTS, seed=3)
    chosen = FREQUENCIES[[0, 2]]
    for head in range(HEADS):
        group = head * GROUPS // HEADS
        expected = rotate(query[head] @ x, 5 + distance, FREQUENCIES) @ rotate(
            key[group] @ y, 5, FREQUENCIES
        )
        rotated = rotate(result.q_rope[head] @ x, 5 + distance, chosen) @ rotate(
            result.k_rope @ y, 5, chosen
        )
        plain = (result.q_nope[head] @ x) @ (result.k_nope[group] @ y)
        assert float(rotated + plain) == pytest.approx(float(expected), abs=1e-9)


def test_heads_that_are_rotations_of_one_another_share_a_key_exactly():
    """Complex weights see through a phase between heads, for which real ones have no answer."""
    base = random(1, WIDTH, INPUTS)
    phase = torch.exp(1j * torch.tensor([0.4, 1.1, 2.0, 2.9], dtype=torch.float64))
    other = from_pairs(0.7 * phase[None, :, None] * to_pairs(base))
    result = split(random(HEADS, WIDTH, INPUTS, seed=1), torch.cat([base, other]), [0, 1, 2, 3])
    assert result.k_nope.abs().max() < 1e-9


def test_mean_turn_of_known_and_unknown_distances():
    habits = torch.zeros(2, 4, dtype=torch.float64)
    habits[0, 1] = 3.0  # always the previous token
    habits[1, 0] = 1.0  # always itself
    prior = mean_turn(FREQUENCIES, None, 2)
    assert torch.equal(prior[0], prior[1])
    assert (prior.abs() <= 1).all()
    turn = mean_turn(FREQUENCIES, habits, 2)
    previous = torch.exp(-1j * FREQUENCIES)
    assert torch.allclose(2 * turn[0] - prior[0], previous)
    assert torch.allclose(2 * turn[1] - prior[1], torch.ones_like(previous))


def test_nearest_pairs_follow_the_stride_and_never_repeat():
    wide = 10000.0 ** (-torch.arange(16).double() / 16)
    narrow = 10000.0 ** (-torch.arange(8).double() / 8)
    assert nearest_pairs(wide, narrow) == list(range(0, 16, 2))
    odd = 10000.0 ** (-torch.arange(11).double() / 11)
    chosen = nearest_pairs(wide, odd)
    assert len(set(chosen)) == 11
    assert nearest_pairs(wide, wide) == list(range(16))
