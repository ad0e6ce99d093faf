"""The report's page in a real browser, without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.report.page import to_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    if os.environ.get("CI"):
        pytest.fail(f"none of {', '.join(BROWSERS)} is installed; CI must have one")
    pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)} (Debian: apt-get install chromium)")


def level(system: str, load: float, rate: float, **more: Any) -> dict[str, Any]:
    figure = {"p50": 0.5, "p90": 0.6, "p99": 0.7, "low": 0.4, "high": 0.6}
    return {
        "system": system,
        "pass": 1,
        "workload": "chat",
        "level": load,
        "status": "ok",
        "reason": "",
        "figures": {
            "output_tokens_per_s": {"value": rate, "low": rate - 1, "high": rate + 1},
            **dict.fromkeys(("ttft_s", "tpot_s", "itl_s", "latency_s"), figure),
        },
        "ratios": {"output_tokens_per_s": {"value": rate / 100, "low": None, "high": None}},
        "server": {
            "peak_running": 4,
            "peak_kv_usage": 0.25,
            "samples": [{"time_s": t, "running": 4, "kv_usage": 0.25} for t in (0, 1, 2)],
        },
        **more,
    }


def report() -> dict[str, Any]:
    dead = {"status": "out of memory", "reason": "</script><b>CUDA out of memory</b>"}
    failed = level("ours", 8, 0.0, **dead)
    del failed["figures"]
    return {
        "name": "nightly <&>",
        "control": "teacher",
        "complete": False,
        "missing": 2,
        "provenance": {"machine": "a box", "versions": {"vllm": "0.23.0"}, "commit": "abc",
                       "date": "2026-01-01"},
        "drift": {"rows": [], "worst": {"output_tokens_per_s": 0.012, "ttft_s": 0.2,
                                        "tpot_s": None}},
        "crosscheck": None,
        "options": {"workloads": [{"name": "chat"}, {"name": "long"}], "server": {"devices": 4}},
        "memory": [
            {"system": "ours", "pass": 1, "workload": "chat", "level": 1,
             "formula_bytes_per_request": 3 << 19, "used_bytes_per_request": 5 << 18},
        ],
        "levels": [
            level("teacher", 1, 100.0),
            level("teacher", 8, 300.0),
            level("ours", 1, 110.0, spread="TP2xDP2"),
            failed,
        ],
    }  # fmt: skip


class Seen(HTMLParser):
    """Text and elements of the page as the browser has drawn it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open in ("td", "th", "h1", "p"):
            self.cells.append(data)
            self._open = ""


def drawn(browser: str, page: Path, tmp_path: Path) -> Seen:
    """The page's elements after its script ran; nothing may be fetched meanwhile."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return Seen(done.stdout)


def test_page_is_drawn(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(to_page(report()))
    seen = drawn(browser, page, tmp_path)
    assert ("body", {"data-ready": "yes"}) in seen.tags
    assert "Serving benchmark: nightly <&>" in seen.cells
    assert "Partial: 2 levels are missing." in seen.cells
    lines = [attributes for tag, attributes in seen.tags if tag == "path"]
    assert [line["data-system"] for line in lines] == ["teacher", "ours"]
    assert sum(tag == "circle" for tag, _ in seen.tags) == 3
    assert {"300.0", "110.0", "3.00", "25.0%", "out of memory"} <= set(seen.cells)
    assert {"ours TP2xDP2", "1.5", "1.3"} <= set(seen.cells)
    assert any("4 devices for every system" in cell for cell in seen.cells)
    assert sum(tag == "tr" for tag, _ in seen.tags) == 5
    assert not any(tag == "b" for tag, _ in seen.tags)  # a log's text is text
    options = [attributes["value"] for tag, attributes in seen.tags if tag == "option"]
    assert {"chat", "long", "throughput", "kv_usage"} <= set(options)


@pytest.mark.parametrize("figure", ["ttft", "tpot", "pareto", "kv_usage", "running"])
def test_every_figure_can_be_chosen(browser: str, tmp_path: Path, figure: str) -> None:
    """By the same handler that a person's choice calls."""
    choose = (
        f"<script>document.querySelector('#figure').value = '{figure}';"
        "document.querySelector('#figure').onchange();"
        "document.querySelectorAll('#results th')[2].click();</script></html>"
    )
    page = tmp_path / "report.html"
    page.write_text(to_page(report()).replace("</html>", choose))
    seen = drawn(browser, page, tmp_path)
    lines = [attributes["d"] for tag, attributes in seen.tags if tag == "path"]
    assert len(lines) == (2 if figure in ("ttft", "tpot", "pareto") else 1)
    assert all(line and re.fullmatch(r"[ML][\d. MLe-]+", line) for line in lines)
    cells = [cell for cell in seen.cells if re.fullmatch(r"[\d.]+\.\d", cell)]
    assert cells[0] == "100.0"  # sorted by rate, the least first


def test_page_asks_nothing_of_a_network() -> None:
    text = to_page(report())
    assert not re.search(
        r"""(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)|@import|fetch\(""", text
    )
