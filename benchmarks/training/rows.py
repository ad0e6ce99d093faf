"""The committed form of an experiment: its values as rows, each beside its control."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.training.measure import parts_of, restore, settings
from benchmarks.training.options import TEACHER, Run
from benchmarks.training.plan import UNTRAINED, Plan
from benchmarks.training.stages import describe, read_result, speed, stage_of
from training.evaluation.rows import Table
from training.evaluation.variants import Variant
from training.files import read_json

_ABOUT = ("tokens", "seconds", "state", "parts", "device", "commit")


def training_rows(plan: Plan) -> list[dict[str, Any]]:
    """Speed and losses of every stage that began."""
    found = []
    for run in plan.experiment.runs:
        result = read_result(plan.layout, run.name)
        for stage, known in result.get("stages", {}).items():
            config = known["config"]
            case = (
                f"training {plan.label} {result['edit']['words']} {stage} "
                f"B{config['optim.batch']} L{config['data.sequence_length']} {run.name}"
            )
            found += list(_stage_rows(case, known, stage))
    return found


def _stage_rows(case: str, known: dict[str, Any], stage: str) -> Iterator[dict[str, Any]]:
    about = {key: known.get(key) for key in _ABOUT}
    rate, mfu = speed(known)
    if rate is not None:
        yield {
            "case": case, "metric": "tokens per second", "value": rate, "unit": "tok/s",
            "control": None, "ratio": None, **about, "mfu": mfu,
        }  # fmt: skip
    for kind, value in (known.get("shares") or {}).items():
        yield {
            "case": case, "metric": f"time of {kind}", "value": value, "unit": "share",
            "control": "traced steps", "ratio": value, **about,
        }  # fmt: skip
    name = "loss" if stage == "stage1" else "kl"
    last, first = known["last"].get(name), known["first"].get(name)
    if last is not None:
        yield {
            "case": case,
            "metric": "relative squared error" if stage == "stage1" else "KL to the teacher",
            "value": last,
            "unit": "share" if stage == "stage1" else "nat",
            "control": "first steps",
            "ratio": last / first if first else None,
            **about,
        }


def quality_rows(plan: Plan) -> list[dict[str, Any]]:
    """Everything that was measured, beside the teacher and the best training-free rival."""
    table, config = Table(plan.label), plan.models.measure
    baselines = plan.experiment.baselines
    names = {TEACHER: TEACHER} | {one.name: _rival_words(plan, one) for one in baselines}
    for run in plan.experiment.runs:
        words = _words(plan, run)
        names[run.name + UNTRAINED] = f"{_student_words(plan, run)} untrained"
        names[run.name] = f"{words} {run.name}"
    seen: set[tuple[str, str, str]] = set()
    for name, words in names.items():
        variant = Variant(name, words, _never, {})
        for part in parts_of(config, ("text", "passkey", "tasks")):
            path = plan.layout.measured(name, part)
            kept = read_json(path, "measurement") if path.is_file() else None
            if kept is None or kept["settings"] != settings(config, part):
                continue
            found = [restore(one) for one in kept["measurements"]]
            for one in found:
                if (name, one.what, one.metric) not in seen:  # every part has the KV cache
                    seen.add((name, one.what, one.metric))
                    table.add(variant, one)
            if part.startswith("tasks-"):
                table.add_task_mean(variant, int(part.removeprefix("tasks-")), found)
    add_rivals(table.rows, [one.name for one in baselines])
    return table.rows


def _never() -> Any:
    raise NotImplementedError("what was measured is not loaded again")


def add_rivals(rows: list[dict[str, Any]], baselines: list[str]) -> None:
    """Beside each value, the best that needs no training."""
    for row in rows:
        rivals = [
            one for one in rows
            if one["variant"] in baselines
            and (one["what"], one["metric"]) == (row["what"], row["metric"])
        ]  # fmt: skip
        if not rivals or row["variant"] in (TEACHER, *baselines) or row["unit"] == "B":
            continue
        pick = max if row["higher_is_better"] else min
        best = pick(rivals, key=lambda one: float(one["value"]))
        row["training_free"] = best["variant"]
        row["ratio_to_training_free"] = row["value"] / best["value"] if best["value"] else None
        better = row["value"] > best["value"]
        row["beats_training_free"] = better == row["higher_is_better"]


def _student_words(plan: Plan, run: Run) -> str:
    folder = plan.models.edit(run)
    if folder is not None and (folder / "config.json").is_file():
        return str(describe(str(folder))["words"])
    known = read_result(plan.layout, run.name).get("edit", {})
    return str(known.get("words", run.student.target if run.student else ""))


def _words(plan: Plan, run: Run) -> str:
    """The edit, then every stage that led here with its tokens."""
    result = read_result(plan.layout, run.name)
    start = _words(plan, plan.models.runs[run.after]) if run.after else _student_words(plan, run)
    for stage in run.stages:
        known = stage_of(result, stage)
        if known:
            start += f" {stage} {known['tokens'] / 1e6:.4g}M"
    return start


def _rival_words(plan: Plan, one: Any) -> str:
    full = one.full_layers
    if full == "chosen" and plan.models.chosen() is not None:
        full = ",".join(map(str, plan.models.chosen() or ()))
    return f"windows sinks{one.sinks} W{one.window} full {full} untrained"
