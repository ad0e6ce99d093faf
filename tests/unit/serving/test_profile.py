"""Profiles in a serving report."""

from __future__ import annotations

from benchmarks.serving.report.sections import profile_section


def test_profiles_in_the_report() -> None:
    one = {"workload": "w", "level": 8.0, "system": "ours", "shares": {"GEMM": 0.75, "idle": 0.25}}
    text = "\n".join(profile_section([one]))
    assert "| w at 8 | ours | 75.0% | 25.0% |" in text
    assert profile_section([]) == []
