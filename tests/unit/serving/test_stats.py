"""Figures from requests whose times are made up."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving.levels import client_figures, too_slow
from benchmarks.serving.options import Goal, Measure
from benchmarks.serving.records import CUT, ClientCost, Record, read_records, write_records
from benchmarks.serving.stats import interval, ratio, steady_since, summarise, token_arrivals

GOAL = Goal(ttft_s=1.0, tpot_s=0.1)


def record(sent: float, ttft: float, gaps: list[float], error: str = "", tokens: int = 0) -> Record:
    first = sent + ttft
    last = first + sum(gaps)
    return Record(
        0,
        sent_s=sent,
        first_s=first,
        last_s=last,
        end_s=last,
        gaps_s=array("f", gaps),
        prompt_tokens=10,
        output_tokens=tokens or len(gaps) + 1,
        error=error,
    )


def test_figures_of_known_requests() -> None:
    records = [
        record(0.0, 0.5, [0.05] * 10),
        record(1.0, 2.0, [0.05] * 10),  # its first token is too late
        record(2.0, 0.5, [0.2] * 10),  # its tokens are too slow
        record(3.0, 0.5, [0.05] * 4, error=CUT),
        record(4.0, 0.5, [], error="HTTP 500: no"),
    ]
    figures = summarise(records, 0.0, 10.0, GOAL, steady=False)
    assert figures["output_tokens_per_s"]["value"] == pytest.approx((33 + 5) / 10)
    assert (figures["requests"], figures["failed"]) == (3, 1)
    assert figures["errors"] == ["HTTP 500: no"]
    assert figures["ttft_s"]["p50"] == pytest.approx(0.5)  # of four: the cut one had its first
    assert figures["tpot_s"]["p50"] == pytest.approx(0.05, rel=1e-5)
    assert figures["tpot_s"]["p99"] == pytest.approx(0.2, rel=0.03)
    assert figures["goodput"] == {"requests_per_s": pytest.approx(0.1), "share": 1 / 3}
    assert figures["output_tokens_per_s"]["low"] is None


def test_the_rate_of_a_closed_load_has_the_interval_of_its_requests() -> None:
    """Four users in step, whose tokens all come in one of every three seconds."""
    draw = np.random.default_rng(0)
    records = [
        record(float(start), 2.0 + draw.uniform(-0.05, 0.05), [0.1] * 9)
        for start in range(0, 30, 3) for _ in range(4)
    ]  # fmt: skip
    closed = summarise(records, 0.0, 30.0, GOAL, steady=True, closed=True)["output_tokens_per_s"]
    opened = summarise(records, 0.0, 20.0, GOAL, steady=True)["output_tokens_per_s"]
    assert closed["value"] == pytest.approx(400 / 30)
    assert closed["low"] < closed["value"] < closed["high"]
    assert closed["high"] / closed["low"] < 1.02
    assert opened["high"] / opened["low"] > 1.1
    # Twice the spread of latencies, about twice the interval.
    wider = [record(r.sent_s, 2 + 2 * (r.ttft_s - 2), [0.1] * 9) for r in records]
    wide = summarise(wider, 0.0, 30.0, GOAL, steady=True, closed=True)["output_tokens_per_s"]
    grown = (wide["high"] - wide["low"]) / (closed["high"] - closed["low"])
    assert grown == pytest.approx(2, rel=0.05)


def test_one_request_tells_no_interval() -> None:
    rate = summarise([record(0.0, 1.0, [0.1])], 0.0, 2.0, GOAL, steady=True, closed=True)
    assert rate["output_tokens_per_s"]["low"] is None


def test_only_tokens_within_the_interval_count() -> None:
    records = [record(0.0, 1.0, [1.0] * 9)]  # tokens at 1, 2, ... 10
    figures = summarise(records, 3.0, 6.0, GOAL, steady=True)
    assert figures["output_tokens_per_s"]["value"] == pytest.approx(1.0)
    assert figures["requests"] == 0  # its first token came before, its end after
    assert figures["ttft_s"]["p50"] is None
    late = summarise(records, 8.5, 10.5, GOAL, steady=True)
    assert (late["requests"], late["ttft_s"]["p50"]) == (1, None)
    assert late["tpot_s"]["p50"] == pytest.approx(1.0)


def test_tokens_that_came_together_all_count() -> None:
    assert len(token_arrivals([record(0.0, 1.0, [1.0], tokens=4)])) == 4
    assert len(token_arrivals([record(0.0, 1.0, [1.0], error="lost")])) == 0


@given(st.lists(st.floats(1, 100), min_size=2, max_size=50))
def test_an_interval_holds_its_statistic(values: list[float]) -> None:
    low, high = interval(values, np.mean)
    assert min(values) - 1e-6 <= low <= high <= max(values) + 1e-6
    assert interval(values, np.mean) == (low, high)


def test_intervals_of_a_normal_mean_are_as_wide_as_they_should_be() -> None:
    data = np.random.default_rng(0).normal(10, 2, 400)
    low, high = interval(data, np.mean)
    assert high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)


def test_ratio_is_as_wide_as_both_leave_open() -> None:
    ours = {"value": 20.0, "low": 18.0, "high": 22.0}
    control = {"value": 10.0, "low": 9.0, "high": 11.0}
    assert ratio(ours, control) == {"value": 2.0, "low": 18 / 11, "high": 22 / 9}
    assert ratio({**ours, "low": None}, control)["low"] is None
    assert ratio(ours, {"value": 0.0, "low": None, "high": None})["value"] is None


def totals(rates: list[float]) -> list[tuple[float, float]]:
    """Samples twice a second of a counter that grows at ``rates``, a second each."""
    times = np.arange(0, len(rates) + 0.25, 0.5)
    counts = np.interp(times, np.arange(len(rates) + 1), np.concatenate([[0], np.cumsum(rates)]))
    return list(zip(times.tolist(), counts.tolist(), strict=True))


def test_steady_state_begins_where_windows_agree() -> None:
    measure = Measure(window_s=1, windows=3, within=0.1)
    rising = [10.0, 50.0, 90.0, 100.0, 101.0, 99.0, 100.0]
    assert steady_since(totals(rising), measure, 0.0) == pytest.approx(2.0)
    assert steady_since(totals(rising), measure, 4.0) == pytest.approx(4.0)
    assert steady_since(totals(rising[:4]), measure, 0.0) is None
    assert steady_since(totals([10.0, 90.0] * 5), measure, 0.0) is None
    assert steady_since(totals([0.0] * 9), measure, 0.0) is None
    assert steady_since([], measure, 0.0) is None


def test_records_survive_their_file(tmp_path) -> None:
    cost = ClientCost(0.2, 0.001, 0.002, 8.0)
    write_records(tmp_path / "1.jsonl", [record(5.0, 0.5, [0.25, 0.5])], cost)
    write_records(tmp_path / "2.jsonl", [record(1.0, 0.5, [], error="gone")], cost)
    records, costs = read_records(sorted(tmp_path.glob("*.jsonl")))
    assert [r.sent_s for r in records] == [1.0, 5.0]
    assert records[1].gaps_s == array("f", [0.25, 0.5])
    assert records[0].failed
    assert costs == [cost, cost]


def test_a_client_that_cannot_keep_up_is_told() -> None:
    easy = ClientCost(cpu=0.1, lag_p99_s=0.002, lag_max_s=0.05, streams=200.0)
    assert not too_slow([easy, easy], Measure())
    assert too_slow([easy, ClientCost(0.9, 0.002, 0.05, 200.0)], Measure())
    assert too_slow([ClientCost(0.1, 0.2, 0.5, 200.0)], Measure())
    assert not too_slow([ClientCost(0.1, 0.2, 0.5, 200.0)], Measure(client_late_s=0.3))
    assert client_figures([easy, easy], 7)["cpu_cores_per_100_streams"] == 0.05
