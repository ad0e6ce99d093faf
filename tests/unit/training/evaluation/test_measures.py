"""Intervals, perplexity and agreement, each held to a plain computation of the same thing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.training.small import ids_of
from training.evaluation import intervals, text
from training.evaluation.intervals import (
    Estimate,
    exponential,
    mean_of,
    mean_over,
    share_of,
)
from training.evaluation.text import agreement, perplexity, window_losses


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=40))
def test_intervals_of_means(values):
    found = mean_of(values)
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    half = 1.959964 * np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.half_width == pytest.approx(half, abs=1e-9)


def test_intervals_of_shares():
    assert share_of(0, 10).low == 0.0
    assert share_of(10, 10).high == pytest.approx(1.0)
    middle = share_of(50, 100)  # the textbook's example of Wilson's interval
    assert middle.low == pytest.approx(0.4038, abs=1e-4)
    assert middle.high == pytest.approx(0.5962, abs=1e-4)
    assert mean_of([3.0]) == Estimate(3.0, None, None, 1)
    assert exponential(Estimate(0.0, -1.0, 1.0, 5)).high == pytest.approx(math.e)
    both = mean_over([Estimate(1.0, 0.7, 1.3, 5), Estimate(3.0, 2.6, 3.4, 7)])
    assert (both.value, both.count) == (2.0, 12)
    assert both.half_width == pytest.approx(0.25)


def test_perplexity_is_the_librarys_loss(student):
    ids = ids_of(3, 40)
    expected = [student(row[None], labels=row[None]).loss.item() for row in ids]
    assert window_losses(student, ids, tokens=80) == pytest.approx(expected, rel=1e-5)
    assert perplexity(student, ids).value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_agreement(teacher, student):
    ids = ids_of(3, 40)
    same, above = agreement(teacher, teacher, ids)
    assert {each: estimate.value for each, estimate in above.items()} == {(1, 39): 0.0}
    assert same["top1"].value == 1.0
    assert same["kl"].value == pytest.approx(0, abs=1e-6)
    found, _ = agreement(student, teacher, ids, tokens=40)
    with torch.no_grad():
        p = torch.log_softmax(teacher(ids).logits[:, :-1], -1)
        q = torch.log_softmax(student(ids).logits[:, :-1], -1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert found["kl"].value == pytest.approx(kl, rel=1e-5)
    top1 = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert found["top1"].value == pytest.approx(top1)


def test_loss_above_the_teachers_by_position(teacher, student, monkeypatch):
    monkeypatch.setattr(text, "_FIRST_RANGE", 8)
    monkeypatch.setattr(text, "_CHUNK", 7)  # ranges and chunks end in different places
    ids = ids_of(3, 40)
    _, above = agreement(student, teacher, ids)
    assert list(above) == [(1, 8), (9, 16), (17, 32), (33, 39)]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
            )
            for model in (student, teacher)
        ]
    for (first, last), estimate in above.items():
        gap = (losses[0] - losses[1])[:, first - 1 : last].mean(1)
        assert estimate.value == pytest.approx(gap.mean().item(), abs=1e-6)
        assert estimate.half_width == pytest.approx(
            intervals.Z * gap.std().item() / 3**0.5, abs=1e-6
        )


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (2, [(1, 1)]),
        (129, [(1, 128)]),
        (130, [(1, 128), (129, 129)]),
        (2048, [(1, 128), (129, 256), (257, 512), (513, 1024), (1025, 2047)]),
    ],
)
def test_ranges_cover_every_prediction_once(length, expected):
    assert text.position_ranges(length) == expected
