"""A level's repeats: prompts that nobody had before, and one result of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import levels, repeats
from benchmarks.serving.options import Options

METRICS = ("ttft_s", "tpot_s", "itl_s", "latency_s")


def result(rate: float, time: float, status: str = "ok") -> dict[str, Any]:
    """What one burst brought, with all times alike."""
    if status != "ok":
        return {"status": status, "reason": "dead"}
    times = {"p50": time, "p90": 2 * time, "p99": 3 * time, "low": None, "high": None}
    figures = {name: dict(times) for name in METRICS}
    rates = {"value": rate, "low": None, "high": None}
    return {"status": "ok", "figures": {"output_tokens_per_s": rates, "requests": 4} | figures}


@pytest.fixture
def options(config: dict[str, Any]) -> Options:
    burst = {"load": "burst", "levels": [1, 2], "repeats": 3}
    config["workloads"] = [{"name": "short", **burst}, {"name": "long", **burst}]
    return Options.model_validate(config)


def test_each_metric_has_its_own_median(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of the median rate is the slowest to its first token here."""
    runs = iter([result(168.2, 0.214), result(167.7, 0.225), result(167.5, 0.220)])
    monkeypatch.setattr(repeats, "run_level", lambda *_: next(runs))
    monkeypatch.setattr(repeats, "wait_until_idle", lambda _: True)
    got: Any = repeats.run_repeats(None, options.workloads[0], 1, {}, options, Path())  # type: ignore[arg-type]
    figures = got["figures"]
    assert got["repeats"] == 3
    assert figures["requests"] == 4
    assert figures["output_tokens_per_s"] == {"value": 167.7, "low": 167.5, "high": 168.2}
    for name in METRICS:
        assert figures[name] == pytest.approx(
            {"p50": 0.220, "p90": 0.440, "p99": 0.660, "low": 0.214, "high": 0.225}
        )


def test_one_repeat_without_figures_is_the_result(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = iter([result(168.2, 0.214), result(0, 0, "failed")])
    monkeypatch.setattr(repeats, "run_level", lambda *_: next(runs))
    monkeypatch.setattr(repeats, "wait_until_idle", lambda _: True)
    got: Any = repeats.run_repeats(None, options.workloads[0], 1, {}, options, Path())  # type: ignore[arg-type]
    assert got == {"status": "failed", "reason": "dead"}


def test_prompts_are_never_those_of_another_burst(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of another workload, level or repeat; but the same for every system."""
    seeds: list[int] = []

    def note(_: Any, workload: Any, *__: Any) -> dict[str, Any]:
        seeds.append(workload.seed)
        return result(1.0, 1.0)

    monkeypatch.setattr(repeats, "run_level", note)
    monkeypatch.setattr(repeats, "wait_until_idle", lambda _: True)
    for _ in range(2):
        for workload in options.workloads:
            for level in workload.levels:
                repeats.run_repeats(None, workload, level, {}, options, Path())  # type: ignore[arg-type]
    once = len(seeds) // 2
    assert seeds[:once] == seeds[once:]
    assert len(set(seeds)) == once == 2 * 2 * 3
    assert min(seeds) > 0  # 0 asks for new prompts in every run


def test_a_second_attempt_asks_something_new(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first one asked lies in the server's cache; and it must be idle again."""
    seeds: list[int] = []
    monkeypatch.setattr(levels.os, "cpu_count", lambda: 8)

    def attempt(_: Any, workload: Any, *__: Any) -> dict[str, Any]:
        seeds.append(workload.seed)
        return {"status": "client too slow" if len(seeds) == 1 else "ok"}

    monkeypatch.setattr(levels, "_attempt", attempt)
    idle = iter([True])
    monkeypatch.setattr(levels, "wait_until_idle", lambda _: next(idle))
    arguments: Any = (None, options.workloads[0], 2, {}, options.measure, options.goal, Path())
    assert levels.run_level(*arguments)["status"] == "ok"
    assert len(set(seeds)) == 2
    assert next(idle, None) is None
