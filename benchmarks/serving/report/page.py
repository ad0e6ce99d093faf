"""The report as one web page: data, drawing and style in one file, nothing from any network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).with_name("page.html")
_PLACE = "/*DATA*/null"


def to_page(report: dict[str, Any]) -> str:
    """The page for ``report``."""
    data = {
        key: report[key]
        for key in ("name", "control", "complete", "missing", "provenance", "drift", "levels",
                    "crosscheck", "memory")
    }  # fmt: skip
    data["devices"] = report["options"]["server"]["devices"]
    data["workloads"] = [workload["name"] for workload in report["options"]["workloads"]]
    # In a script element only "</" and "<!--" could end the data early.
    text = json.dumps(data).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace(_PLACE, text)
