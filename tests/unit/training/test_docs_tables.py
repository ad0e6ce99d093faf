"""The tables of docs/training.md are those of the committed results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from tests.unit.committed import ROOT, Measured, models_of, rows_of

PAGE = ROOT / "docs" / "training.md"
TRAINED = {
    "teacher": "teacher",
    "gateswa-inherit@untrained": "GateSWA, untrained",
    "gateswa-inherit": "GateSWA, 158M tokens",
    "gateswa-long": "and 100M more, of long texts",
    "gateswa-everything": "and 100M more, everything trained",
    "gateswa-long-everything": "and 100M more, both",
    "gateswa-random": "GateSWA from random weights, 70M",
    "mla-inherit@untrained": "MLA, untrained",
    "mla-stage1": "the earlier start, 30M of Stage 1 alone",
    "mla-inherit": "the earlier start, 155M tokens",
    "mla-random": "MLA from random weights, 80M",
    "sinks": "windows and 4 sinks, every 6th layer full",
    "sinks-chosen": "windows and 4 sinks, chosen layers full",
    "windows-chosen": "windows, chosen layers full",
}
FURTHER = {
    "gateswa-256": "GateSWA, window 256, 100M tokens",
    "gateswa-random-steps": "the same, 64M in four times the steps",
    "mla-stage1": "MLA, 30M tokens of Stage 1 alone",
    "mla-3e-4": "MLA, 150M tokens",
}
TASKS_ELSEWHERE = {"mla-3e-4": "training_mla_tasks_cpu.json"}
QWEN = {
    "teacher": "teacher",
    "gateswa-256@untrained": "GateSWA, untrained",
    "gateswa-256": "GateSWA, 24M tokens",
    "sinks": "windows and 4 sinks, every 6th layer full",
    "sinks-chosen": "windows and 4 sinks, chosen layers full",
}
ABLATION = {
    "base": "base: window 128, gate, from the teacher's attention",
    "no-stage1": "no Stage 1",
    "no-gate": "no gate",
    "cosine": "cosine term, weight 0.05",
    "random": "from random weights",
    "random-no-stage1": "from random weights, no Stage 1",
    "window-64": "window 64",
    "window-256": "window 256",
    "window-512": "window 512",
    "early": "full layers 0, 4, 8, 12, 16",
    "mla": "MLA, the earlier start, 1e-4 in Stage 2",
    "mla-3e-4": "MLA, the earlier start, 3e-4 in Stage 2",
}
LAYERS = {
    "seed-1": "base with another seed",
    "gate-elementwise": "a gate for every element",
    "layers-other-text": "full layers 15, 17, 18, 20, 23 (chosen on other text)",
    "layers-plain": "full layers 12, 14, 17, 18, 20 (chosen without sinks)",
    "layers-wide": "full layers 8, 13, 17, 20, 24",
    "layers-spaced": "full layers 11, 14, 17, 20, 23",
    "every-sixth": "every sixth layer full",
}


def _section(title: str) -> str:
    """What stands under a heading of the third level."""
    return PAGE.read_text(encoding="utf-8").split(f"### {title}\n")[1].split("\n### ")[0]


def _seen(what: str) -> str | None:
    """The cell of how many tokens a prediction has seen, where that was measured apart."""
    ends = re.search(r"after (\d+)-(\d+) tokens", what)
    return " to ".join(f"{int(end):,}" for end in ends.groups()) if ends else None


def _half(row: dict[str, Any], of: str = "") -> float:
    """Of an interval: a value's, or its ``difference``'s."""
    return float(row[f"{of}high"] - row[f"{of}low"]) / 2


def _agreement(rows: Measured) -> list[str]:
    """Cells: the share of likeliest tokens that are the teacher's, and the KL."""
    same, kl = (rows["agreement wikitext2 L2048", what]["value"] for what in ("top1", "kl"))
    return [f"{same:.1%}", f"{kl:.3f}"]


def _tasks(rows: Measured, examples: int) -> str:
    mean = rows.get((f"mean of 6 tasks {examples}-shot", "acc"))
    if mean is None:
        return ""
    value = f"{100 * mean['value']:.2f}"
    if "difference" not in mean:
        return value
    half = 100 * _half(mean, "difference_")
    return f"{value} ({100 * mean['difference']:+.2f} ± {half:.2f})"


def _line(name: str, rows: Measured, shots: Sequence[int]) -> str:
    cells = [f"{rows['KV cache', 'bytes a token']['value']:,.0f}"]
    for length in (1024, 2048, 4096, 8192):
        cells.append(f"{rows[f'perplexity wikitext2 L{length}', 'perplexity']['value']:.2f}")
    cells += ["", ""] if name == "teacher" else _agreement(rows)
    return " | ".join([*cells, *(_tasks(rows, examples) for examples in shots)])


@pytest.mark.parametrize(
    ("result", "words", "shots"),
    [
        ("smollm2", TRAINED, (0, 5)),
        ("smollm2_further", FURTHER, (0, 5)),
        ("qwen2.5_coder_0.5b", QWEN, (0,)),
    ],
)
def test_the_table_of_trained_models_is_that_of_the_result(
    result: str, words: dict[str, str], shots: Sequence[int]
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    models = models_of(f"training_{result}_h200.json")
    assert set(models) == {*words, "teacher"}
    for name, label in words.items():
        rows = models[name]
        if name in TASKS_ELSEWHERE:
            rows = models_of(TASKS_ELSEWHERE[name])[name] | rows
        assert f"| {label} | {_line(name, rows, shots)} |" in text, name


def test_models_of_two_machines_stand_beside_one_teacher() -> None:
    results = ("training_smollm2_h200.json", "training_smollm2_further_h200.json")
    first, second = (_line("teacher", models_of(name)["teacher"], ()) for name in results)
    assert first == second


@pytest.mark.parametrize(("result", "words"), [("", ABLATION), ("_layers", LAYERS)])
def test_the_table_of_the_ablation_is_that_of_the_result(
    result: str, words: dict[str, str]
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    models = models_of(f"training_ablation{result}_h200.json")
    last = {
        row["case"].split()[-1]: row["value"]
        for row in rows_of(f"training_ablation{result}_h200.json")
        if row["metric"] == "KL to the teacher"
    }
    assert set(last) == set(words)
    teacher = models["teacher"]["perplexity wikitext2 L2048", "perplexity"]["value"]
    for name, label in words.items():
        value = models[name]["perplexity wikitext2 L2048", "perplexity"]["value"]
        cells = [label, f"{value:,.2f}", f"{value / teacher - 1:.1%}", *_agreement(models[name])]
        assert f"| {' | '.join([*cells, f'{last[name]:.3f}'])} |" in text, name


def test_the_table_of_the_demo_is_that_of_the_result() -> None:
    table = _section("The edit of the demo")
    models = models_of("training_demo_cpu.json")
    for (what, metric), row in models["kept"].items():
        other = models["sinks"][what, metric]
        if seen := _seen(what):
            cells = [seen]
            for one in (row, other):
                cells.append(f"{one['value']:+.3f} ± {_half(one):.3f}" if one["value"] else "0")
            assert f"| {' | '.join(cells)} |" in table, what
        elif what.startswith("perplexity"):
            for one in (row, models["teacher"][what, metric], other):
                assert f"{one['value']:.2f}" in table


def test_the_table_of_runs_of_one_token_is_that_of_the_result() -> None:
    table = _section("Runs of one token")
    models = models_of("training_repetition_cpu.json")
    lines: dict[str, list[str]] = {}
    for model in ("gateswa-256", "sinks", "mla"):
        for text in ("one", "ha", "pattern"):
            for (what, _), row in models[model].items():
                if what.startswith(f"{text} ") and (seen := _seen(what)):
                    lines.setdefault(seen, []).append(f"{row['value']:+.2f}")
    assert len(lines) == 5
    for seen, cells in lines.items():
        assert len(cells) == 9
        assert f"| {' | '.join([seen, *cells])} |" in table, seen


def test_the_table_of_mlas_start_is_that_of_the_result() -> None:
    table = _section("What MLA's start must look like")
    for row in rows_of("training_mla_start_cpu.json"):
        mean = row["metric"] in ("KL to the teacher", "relative squared error")
        if mean or "stage2-3e-4" in row["case"]:
            assert f"{row['value']:.3f}" in table, row
