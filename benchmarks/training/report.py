"""Writes ``report.json``, ``report.md`` and ``loss.png`` of what there is of an experiment."""

from __future__ import annotations

from typing import Any

from benchmarks.provenance import provenance
from benchmarks.training.figure import draw
from benchmarks.training.markdown import FIGURE, write_markdown
from benchmarks.training.plan import Plan
from benchmarks.training.rows import quality_rows, training_rows
from benchmarks.training.runner import failures
from benchmarks.training.stages import read_result
from training.files import disk_errors, read_json, write_json


def write_report(plan: Plan) -> None:
    """Write the report into the experiment's folder.

    Raises:
        AttnEditError: if the disk cannot take it.
    """
    layout = plan.layout
    rows = [*training_rows(plan), *quality_rows(plan)]
    results = [read_result(layout, run.name) for run in plan.experiment.runs]
    origin = provenance(apart=True)
    document: dict[str, Any] = {
        "provenance": origin,
        "complete": not plan.missing(),
        "choice": read_json(layout.choice, "choice") if layout.choice.is_file() else None,
        "failed": failures(layout),
        "rows": rows,
    }
    # Calls that share a folder end together.
    with layout.lock("report", wait=True), disk_errors(layout.out):
        layout.out.mkdir(parents=True, exist_ok=True)
        write_json(layout.out / "report.json", document)
        drawn = draw(layout.out / FIGURE, [result for result in results if result])
        text = write_markdown(plan, rows, origin, drawn)
        (layout.out / "report.md").write_text(text, encoding="utf-8")
