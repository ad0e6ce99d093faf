"""From requests and scrapes to figures: rates, percentiles, intervals, goodput, steadiness.

Intervals are 95% bootstrap intervals over requests, of the rate of an open load over windows of
time. They cover the noise within a run; what differs between runs is seen in the control's drift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.serving.options import Goal, Measure
from benchmarks.serving.records import Record

PERCENTILES = (50, 90, 99)
_RESAMPLES = 1000
_WINDOWS = 10


def summarise(
    records: Sequence[Record],
    start_s: float,
    end_s: float,
    goal: Goal,
    *,
    steady: bool,
    closed: bool = False,
) -> dict[str, Any]:
    """Figures of the interval ``[start_s, end_s)``.

    Everything counts when it happens: a token and a time to first token when they arrive, also of
    requests that began before or end later; the others when the request ends.

    Args:
        steady: whether rate and latencies should be the same throughout, so that their spread
            tells an interval; a burst's are not, it has to be repeated.
        closed: whether a number of users ask again as soon as they are answered. Their rate is
            then their number times the tokens of a request over its latency (Little's law), and its
            interval that of requests. Windows of time would tell in which phase users are, who tend
            to be answered together.
    """
    arrivals = token_arrivals(records)
    inside = arrivals[(arrivals >= start_s) & (arrivals < end_s)]
    seconds = max(1e-9, end_s - start_s)
    started = [r for r in records if start_s <= r.first_s < end_s and not r.failed]
    ended = [r for r in records if start_s <= r.end_s <= end_s]
    whole = [r for r in ended if r.whole]
    good = [r for r in whole if r.ttft_s <= goal.ttft_s and (r.tpot_s or 0) <= goal.tpot_s]
    rate: dict[str, Any] = {"value": len(inside) / seconds, "low": None, "high": None}
    if steady and closed and len(whole) > 1:
        low, high = spread_of_rate(whole)
        rate |= {"low": rate["value"] * low, "high": rate["value"] * high}
    elif steady and not closed and len(inside):
        counts, _ = np.histogram(inside, bins=_WINDOWS, range=(start_s, end_s))
        rate["low"], rate["high"] = interval(counts * _WINDOWS / seconds, np.mean)
    gaps = np.concatenate([np.asarray(r.gaps_s) for r in started]) if started else np.zeros(0)
    return {
        "seconds": seconds,
        "requests": len(whole),
        "failed": sum(r.failed for r in ended),
        "errors": sorted({r.error for r in ended if r.failed})[:5],
        "output_tokens_per_s": rate,
        "requests_per_s": len(whole) / seconds,
        "prompt_tokens": int(np.median([r.prompt_tokens for r in whole])) if whole else 0,
        "output_tokens": int(np.median([r.output_tokens for r in whole])) if whole else 0,
        "ttft_s": distribution([r.ttft_s for r in started], with_interval=steady),
        "tpot_s": distribution(
            [r.tpot_s for r in whole if r.tpot_s is not None], with_interval=steady
        ),
        "itl_s": distribution(gaps, with_interval=False),
        "latency_s": distribution([r.latency_s for r in whole], with_interval=steady),
        "goodput": {"requests_per_s": len(good) / seconds, "share": len(good) / max(1, len(whole))},
        "late_s": max((r.late_s for r in records), default=0.0),
    }


def token_arrivals(records: Sequence[Record]) -> np.ndarray:
    """When every output token came, in order. Tokens that came in one event share its time."""
    times: list[np.ndarray] = []
    for r in records:
        if r.first_s and not r.failed:
            events = r.first_s + np.concatenate([[0.0], np.cumsum(np.asarray(r.gaps_s))])
            copies = max(1, round(r.output_tokens / len(events))) if r.output_tokens else 1
            times.append(np.repeat(events, copies))
    return np.sort(np.concatenate(times)) if times else np.zeros(0)


def distribution(values: Any, *, with_interval: bool = True) -> dict[str, float | None]:
    """Percentiles, and the median's interval; all ``None`` without values."""
    data = np.asarray(values, dtype=float)
    names = [f"p{p}" for p in PERCENTILES]
    if not len(data):
        return dict.fromkeys([*names, "low", "high"])
    result: dict[str, float | None] = dict(
        zip(names, np.percentile(data, PERCENTILES).tolist(), strict=True)
    )
    low, high = interval(data, np.median) if with_interval else (None, None)
    return {**result, "low": low, "high": high}


def interval(values: Any, statistic: Callable[..., Any]) -> tuple[float, float]:
    """95% bootstrap interval of ``statistic`` (which takes an axis); always the same for the same
    values."""
    data = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(data), (_RESAMPLES, len(data)))
    low, high = np.percentile(statistic(data[picks], axis=1), (2.5, 97.5))
    return float(low), float(high)


def spread_of_rate(whole: Sequence[Record]) -> tuple[float, float]:
    """95% bootstrap interval of tokens over latency, as factors of what all requests have."""
    pairs = np.array([(r.output_tokens, r.latency_s) for r in whole])

    def tokens_a_second(some: np.ndarray, axis: int) -> np.ndarray:
        tokens, seconds = np.moveaxis(some.sum(axis=axis), -1, 0)
        return np.asarray(tokens / np.maximum(seconds, 1e-9))

    low, high = interval(pairs, tokens_a_second)
    mean = float(tokens_a_second(pairs, 0))
    return low / mean, high / mean


def steady_since(
    samples: Sequence[tuple[float, float]], measure: Measure, not_before: float
) -> float | None:
    """Where the steady state begins, or ``None`` while there is none.

    Args:
        samples: time and tokens generated up to then, in order.
        measure: its windows, and how far their rates may be from their mean.
        not_before: the load is not complete before that.

    Returns:
        The start of the first of ``measure.windows`` windows in a row whose rates agree.
    """
    times = np.array([t for t, _ in samples])
    totals = np.array([n for _, n in samples])
    if not len(times):
        return None
    begin = max(not_before, times[0])
    edges = np.arange(begin, times[-1] + 1e-6, measure.window_s)
    if len(edges) < measure.windows + 1:
        return None
    rates = np.diff(np.interp(edges, times, totals)) / measure.window_s
    for first in range(len(rates) - measure.windows + 1):
        some = rates[first : first + measure.windows]
        mean = some.mean()
        if mean > 0 and np.all(np.abs(some - mean) <= measure.within * mean):
            return float(edges[first])
    return None


def ratio(ours: dict[str, Any], control: dict[str, Any], key: str = "value") -> dict[str, Any]:
    """``ours`` over ``control``, with the widest interval that both leave open."""
    a, b = ours[key], control[key]
    if not a or not b:
        return {"value": None, "low": None, "high": None}
    result: dict[str, Any] = {"value": a / b, "low": None, "high": None}
    if ours["low"] and control["low"]:
        result["low"] = ours["low"] / control["high"]
        result["high"] = ours["high"] / control["low"]
    return result
