"""The progress line: what it says, and that it counts its own speed right."""

from __future__ import annotations

import json
import time

import pytest

from tests.unit.training.small import small_config
from training import progress
from training.loop import Loop
from training.progress import Progress, read_metrics
from training.runs import train


def test_saving_is_no_steps_time(tmp_path, pair, text, monkeypatch):
    """Checkpoints after steps 2 and 4 that take half a second each."""
    save = Loop._save

    def slow(self, step):
        time.sleep(0.5)
        return save(self, step)

    monkeypatch.setattr(Loop, "_save", slow)
    train(small_config(tmp_path / "run", *pair, text), "stage2")
    speed = json.loads((tmp_path / "run" / "speed.json").read_text())
    assert speed["steps"] == 5
    assert speed["step_seconds"]["p75"] < 0.4
    assert speed["seconds"] < 0.9


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


def test_lines_and_speed(tmp_path, monkeypatch):
    clock = Clock()
    lines: list[str] = []
    monkeypatch.setattr(progress, "time", clock)
    report = Progress(
        tmp_path,
        first=0,
        steps=8,
        step_tokens=1_000_000,
        every=2,
        peak=1e12,
        tensorboard=False,
        say=lines.append,
    )
    for step in range(1, 7):
        clock.now += 30.0 if step == 1 else 2.0  # the first step compiles
        report.report(step, {"loss": 1.5, "lr": 1e-3, "kl": 1.25}, flops=1e12)
        if step == 3:  # a checkpoint, between two lines
            clock.now += 100.0
            report.skip(100.0)
    report.close()
    assert len(lines) == 4  # the first step, then every second one
    last = lines[-1]
    for part in ("step 6/8", "6M tokens", "loss 1.50000, kl 1.2500", "lr 1.00e-03", "500K tok/s"):
        assert part in last
    assert "MFU 50.0%" in last
    assert last.endswith("0:00:04 left")
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert speed["tokens_per_second"] == pytest.approx(5e5)
    assert speed["mfu"] == pytest.approx(0.5)
    assert speed["step_seconds"] == pytest.approx({"median": 2.0, "p25": 2.0, "p75": 2.0})
    assert speed["steps"] == 5
    assert [row["tokens"] for row in read_metrics(tmp_path)] == [1_000_000 * i for i in range(1, 7)]
