"""README and docs hold to the repository: links, paths, committed results and their numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.committed import ROOT, rows_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
FIRST_FOLDERS = ("benchmarks", "docker", "docs", "examples", "requirements", "scripts", "tests")
PACKAGES = ("training", "vllm_attnedit")
INSIDE_PLUGIN = ("backends", "hf", "kv_cache", "layers", "models", "ops")


def anchors(page: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = page.parent / path if path else page
        if not found.exists() or (anchor and anchor not in anchors(found.read_text())):
            broken.append(target)
    return broken


def missing_paths(text: str) -> list[str]:
    """Paths of this repository in backticks or in commands that lead nowhere."""
    missing = []
    first = "|".join((*FIRST_FOLDERS, *PACKAGES, *INSIDE_PLUGIN))
    for name in re.findall(rf"(?<![\w./-])(?:{first})/[\w./*{{}},-]*\w(?:\.\w+)?", text):
        base = ROOT / "vllm_attnedit" if name.split("/")[0] in INSIDE_PLUGIN else ROOT
        outer, inner = re.fullmatch(r"([^{]*)(?:\{(.*)\}.*)?", name).groups()  # type: ignore[union-attr]
        names = [outer + part + ".py" for part in inner.split(",")] if inner else [name]
        missing += [each for each in names if not any(base.glob(each))]
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    assert broken_links(page, text) == []
    code = re.findall(r"^```.*?^```|`[^`\n]+`", text, re.S | re.M)
    # What a command writes need not be there.
    assert missing_paths(re.sub(r"--(out|result) \S+", "", "\n".join(code))) == []


def test_the_search_for_broken_references_finds_them() -> None:
    assert broken_links(ROOT / "README.md", "[a](docs/none.md), [b](docs/serving.md#none)")
    assert not broken_links(ROOT / "README.md", "[a](docs/serving.md#kernels-for-mla)")
    assert missing_paths("docs/none.md, ops/none.py, vllm_attnedit/edit/{latent,none}.py") == [
        "docs/none.md",
        "ops/none.py",
        "vllm_attnedit/edit/none.py",
    ]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path: Path) -> None:
    result = json.loads(path.read_text())
    origin = result["provenance"]
    for field in ("machine", "commit", "command", "date"):
        assert isinstance(origin[field], str), field
        assert origin[field], field
    assert {"python", "torch"} <= set(origin["versions"])
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes|-dirty)?", origin["commit"])
    assert result["rows"]
    for row in result["rows"]:
        assert {"case", "metric", "value", "unit", "control"} <= set(row), row
        # Goodput may be nothing at all: it has a share of the requests instead of a ratio.
        assert "ratio" in row or (row["metric"] == "goodput" and "share" in row), row
        assert all(isinstance(row[field], str) for field in ("case", "metric", "unit"))
        assert isinstance(row["value"], int | float)
        assert row.get("ratio") is None or row["control"]
        assert row.get("ratio") is None or row["ratio"] > 0 or row["value"] == 0


def test_every_result_is_named_in_the_docs() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert RESULTS
    assert [path.stem for path in RESULTS if path.stem not in text] == []


def test_the_table_of_latent_decode_on_cpu_is_that_of_the_result() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    for row in rows_of("mla_decode_cpu.json"):
        seconds = [row["value"], row["control_value"], row["products_alone"]]
        seconds += [row["vllm_mla_kernel"], row["fused_attention"]]
        cells = ["" if value is None else f"{value * 1e3:.1f} ms" for value in seconds]
        cells.insert(2, f"{row['ratio']:.1f}x")
        assert f"| {' | '.join([row['case'].removeprefix('mla_decode cpu '), *cells])} |" in text


@pytest.mark.parametrize(
    ("model", "result"),
    [("qwen3-8b", "decode_rate_mla_h200"), ("qwen3-30b-a3b", "decode_rate_mla_30b_h200")],
)
def test_the_tables_of_latent_decode_on_a_gpu_are_those_of_the_results(
    model: str, result: str
) -> None:
    text = re.sub(r"\*\*| tokens/s", "", (ROOT / "docs" / "serving.md").read_text())
    text = text[text.index(f"/{result}.json)") :]
    table = text[text.index("\n| ") :].strip().split("\n\n")[0]
    rows = {(row["case"], row["metric"]): row for row in rows_of(f"{result}.json")}
    points = re.findall(
        r"^\| (\d+) x ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| (\S+)x \| (\S+)x \|", table, re.M
    )
    assert len(points) == len(rows) / 4
    for batch, length, full, mla, rate, ttft in points:
        point = f"B{batch} L{length.replace(',', '')} W128"
        (rate_full, rate_mla), (first_full, first_mla) = (
            [
                rows[f"decode_rate {model} {case} {point}", metric]["value"]
                for case in ("full", "mla")
            ]
            for metric in ("decode_tokens_per_s", "ttft_s")
        )
        assert (full, mla) == (f"{rate_full:,.0f}", f"{rate_mla:,.0f}"), point
        ratios = (f"{rate_mla / rate_full:.2f}", f"{first_mla / first_full:.2f}")
        assert (rate, ttft) == ratios, point


SERVED = {
    "teacher": "teacher",
    "gateswa": "GateSWA",
    "mla": "MLA 512 + 64",
    "mla-narrow": "MLA, queries 128 wide",
    "gateswa-fast": "GateSWA, prompts skip 5 layers",
    "gateswa-early": "GateSWA, prompts skip 10 layers",
    "gateswa-earlier": "GateSWA, prompts skip 15 layers",
    "mla-copies": "MLA 512 + 64",
}


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value < 1 else f"{value:.1f} s"


def _served_lines(name: str, run: str | None = None) -> list[str]:
    """Lines of a table of served models, as a result has them."""
    levels: dict[str, dict[str, Any]] = {}
    for row in rows_of(f"serving_{name}_h200.json"):
        levels.setdefault(row["case"], {})[row["metric"]] = row
    found = []
    for case, metrics in levels.items():
        if " again " in case or " burst " not in case:
            continue
        _, _, system, *spread, _, count, shape, _ = case.split()
        rate, first = metrics["output_tokens_per_s"], metrics["median_ttft_s"]
        ratios = ["" if system == "teacher" else f"{x['ratio']:.2f}x" for x in (rate, first)]
        label = " ".join([SERVED[system], *spread])
        cells = [f"{count.removeprefix('C')} of {shape}", *filter(None, [run]), label]
        cells += [f"{rate['value']:,.0f}", ratios[0], _seconds(first["value"]), ratios[1]]
        cells += [f"{rate['peak_running']:.0f}", f"{rate['peak_kv_usage']:.0%}"]
        cells += [f"{rate['preemptions']:.0f}"]
        found.append(f"| {' | '.join(cells)} |")
    return found


def test_the_tables_of_served_models_are_those_of_the_results() -> None:
    """Line by line; ``a`` to ``e`` are runs of an 8B model, others have 30B-A3B and two GPUs."""
    lines = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    results = ("gateswa", "prompts", "answers", "prompts_more", "prompts_earlier")
    eight = [
        line
        for run, name in zip("abcde", results, strict=True)
        for line in _served_lines(name, run)
    ]
    for header, expected in (
        ("| all at once | run |", eight),
        ("| all at once | |", _served_lines("prompts_30b")),
        ("| all at once on two GPUs |", _served_lines("tp")),
        ("| all at once on two GPUs, 30B-A3B |", _served_lines("tp_30b")),
    ):
        start = next(i for i, line in enumerate(lines) if line.startswith(header)) + 2
        assert sorted(lines[start : lines.index("", start)]) == sorted(expected)


@pytest.mark.parametrize("result", ["tp", "tp_30b"])
def test_the_table_of_kv_memory_on_two_gpus_is_that_of_the_result(result: str) -> None:
    rows: dict[str, dict[str, Any]] = {}
    used: dict[str, list[float]] = {}
    for row in rows_of(f"serving_{result}_h200.json"):
        _, _, system, spread, *_ = row["case"].split()
        name = f"{SERVED[system]} {spread}"
        if row["metric"] == "kv_bytes_per_token_and_device":
            rows[name] = row
        elif row["metric"] == "kv_bytes_per_running_request_and_device":
            used.setdefault(name, []).append(row["ratio"])
    text = (ROOT / "docs" / "benchmarks.md").read_text().replace("**", "")
    for name, row in rows.items():
        held = f"{row['value']:,.0f}" + ", for half of the requests" * name.endswith("DP2")
        least, most = min(used[name]), max(used[name])
        cells = [name, held, f"{row['ratio']:.0%}", f"{least:.1%} to {most:.1%}"]
        assert f"| {' | '.join(cells)} |" in text, cells
    assert len(rows) == len(used) == 4


@pytest.mark.parametrize(
    ("result", "note"),
    [
        ("", ""),
        ("_batch16", ""),
        ("_whole", ", frozen whole"),
        ("_fp32", ""),
        ("_real", ", frozen whole, real weights"),
        ("_emulated", ", the same, casts kept"),
    ],
)
def test_the_table_of_several_gpus_is_that_of_the_results(result: str, note: str) -> None:
    one, several, curve = rows_of(f"training_scaling{result}_h200.json")[:3]
    batch, length, precision = re.findall(r"B(\d+) L(\d+) (\w+) x2$", several["case"])[0]
    # A share of the bf16 peak says nothing of float32.
    shares = [f" ({row['mfu']:.0%}" if precision == "bf16" else "" for row in (one, several)]
    cells = [
        f"{batch} of {int(length):,} in {precision}{note}",
        f"{curve['steps']}",
        f"{one['value']:,.0f}{shares[0] and shares[0] + ' of the peak)'}",
        f"{several['value']:,.0f}{shares[1] and shares[1] + ')'}",
        f"{several['ratio']:.2f}x",
        f"{curve['value']:.1e} nat",
        f"{curve['relative']:.1e}",
    ]
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs" / "benchmarks.md").read_text()
