"""Rows of a report: a measured value with its interval, and how it compares with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from training.evaluation.intervals import Estimate, mean_of, mean_over
from training.evaluation.variants import TEACHER, Variant


@dataclass(frozen=True)
class Measurement:
    """One value of one model.

    Attributes:
        what: the setting in words (``arc_easy 0-shot``, ``perplexity wikitext2 L2048``).
        metric: its name.
        unit: of the value.
        estimate: the value.
        samples: by question, in the same order for all models; empty if there are none.
        higher_is_better: for readers.
    """

    what: str
    metric: str
    unit: str
    estimate: Estimate
    samples: tuple[float, ...] = ()
    higher_is_better: bool = True


@dataclass
class Table:
    """All measurements of a report.

    Args:
        label: the model's name in ``case``.
    """

    label: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    _teacher: dict[tuple[str, str], Measurement] = field(default_factory=dict)

    def add(self, variant: Variant, measurement: Measurement) -> None:
        """Add a value; the teacher's must come first."""
        key = (measurement.what, measurement.metric)
        if variant.name == TEACHER:
            self._teacher[key] = measurement
        control = self._teacher.get(key)
        value, estimate = measurement.estimate.value, measurement.estimate
        row: dict[str, Any] = {
            "case": f"quality {self.label} {variant.words} {measurement.what}",
            "metric": measurement.metric,
            "value": value,
            "unit": measurement.unit,
            "control": TEACHER,
            "ratio": value / control.estimate.value if control and control.estimate.value else None,
            "low": estimate.low,
            "high": estimate.high,
            "count": estimate.count,
            "variant": variant.name,
            "what": measurement.what,
            "higher_is_better": measurement.higher_is_better,
        }
        if control is not None and variant.name != TEACHER:
            row |= _difference(measurement, control)
        self.rows.append(row)

    def add_task_mean(
        self, variant: Variant, shots: int, measurements: Sequence[Measurement]
    ) -> None:
        """The mean accuracy over tasks, with the interval of its difference from the teacher."""
        accuracies = [m for m in measurements if m.metric == "acc"]
        if len(accuracies) < 2:
            return
        estimate = mean_over([m.estimate for m in accuracies])
        what = f"mean of {len(accuracies)} tasks {shots}-shot"
        self.add(variant, Measurement(what, "acc", "share", estimate))
        controls = [self._teacher.get((m.what, m.metric)) for m in accuracies]
        if variant.name == TEACHER or not all(controls):
            return
        paired = [_paired(m, c) for m, c in zip(accuracies, controls) if c is not None]
        if all(part is not None for part in paired):
            difference = mean_over([part for part in paired if part is not None])
            self.rows[-1] |= _named(difference)


def _paired(mine: Measurement, teacher: Measurement) -> Estimate | None:
    """Mean difference over the same questions: what both get right or wrong cancels out."""
    if not mine.samples or len(mine.samples) != len(teacher.samples):
        return None
    return mean_of([a - b for a, b in zip(mine.samples, teacher.samples)])


def _difference(mine: Measurement, teacher: Measurement) -> dict[str, Any]:
    paired = _paired(mine, teacher)
    if paired is not None:
        return _named(paired)
    return {"difference": mine.estimate.value - teacher.estimate.value}


def _named(difference: Estimate) -> dict[str, Any]:
    return {
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
    }
