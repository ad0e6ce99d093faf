"""95% intervals of what is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964
"""97.5% quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; ``None`` where one observation says nothing of the spread.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
        count: observations behind it.
    """

    value: float
    low: float | None
    high: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of observations, by the normal approximation."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, None, None, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    spread = Z * math.sqrt(variance / count)
    return Estimate(mean, mean - spread, mean + spread, count)


def share_of(hits: int, count: int) -> Estimate:
    """A share of successes, with Wilson's interval, which holds near 0 and 1 (Wilson 1927)."""
    share = hits / count
    scale = 1 + Z**2 / count
    middle = (share + Z**2 / (2 * count)) / scale
    spread = Z / scale * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Estimate(share, max(0.0, middle - spread), min(1.0, middle + spread), count)


def exponential(estimate: Estimate) -> Estimate:
    """The estimate of exp(x) from that of x: perplexity from mean loss."""
    low = None if estimate.low is None else math.exp(estimate.low)
    high = None if estimate.high is None else math.exp(estimate.high)
    return Estimate(math.exp(estimate.value), low, high, estimate.count)


def mean_over(estimates: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates, such as the scores of several tasks."""
    value = math.fsum(e.value for e in estimates) / len(estimates)
    count = sum(e.count for e in estimates)
    widths = [e.half_width for e in estimates]
    if any(width is None for width in widths):
        return Estimate(value, None, None, count)
    spread = math.sqrt(math.fsum(width**2 for width in widths if width)) / len(estimates)
    return Estimate(value, value - spread, value + spread, count)
