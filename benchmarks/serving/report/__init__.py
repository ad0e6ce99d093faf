"""The report of a benchmark: Markdown, JSON, PNG figures and one web page, from its results."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from benchmarks.serving.report.collect import collect
from benchmarks.serving.report.figures import draw
from benchmarks.serving.report.markdown import to_markdown
from benchmarks.serving.report.page import to_page

if TYPE_CHECKING:
    from benchmarks.serving.run import Benchmark


def write_report(benchmark: Benchmark) -> str:
    """Write ``report.{md,json,html}`` and figures; returns one JSON line of what came out."""
    report = collect(benchmark)
    out = benchmark.out
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    figures = draw(report, out)
    (out / "report.md").write_text(to_markdown(report, figures))
    (out / "report.html").write_text(to_page(report))
    summary = {
        "benchmark": report["name"],
        "report": str(out / "report.md"),
        "complete": report["complete"],
        "levels": {
            status: sum(level["status"] == status for level in report["levels"])
            for status in sorted({level["status"] for level in report["levels"]})
        },
        "drift": report["drift"]["worst"],
    }
    return json.dumps(summary)
