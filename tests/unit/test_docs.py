"""README and docs hold to the repository: links, paths, committed results and their numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
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


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())[
        "rows"
    ]
    return rows


def test_the_table_of_latent_decode_on_cpu_is_that_of_the_result() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    for row in _rows("mla_decode_cpu.json"):
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
    rows = {(row["case"], row["metric"]): row for row in _rows(f"{result}.json")}
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
    for row in _rows(f"serving_{name}_h200.json"):
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
    for row in _rows(f"serving_{result}_h200.json"):
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
    one, several, curve = _rows(f"training_scaling{result}_h200.json")[:3]
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


def _models(result: str) -> dict[str, dict[tuple[str, str], Any]]:
    models: dict[str, dict[tuple[str, str], Any]] = {}
    for row in _rows(result):
        if "variant" in row:
            models.setdefault(row["variant"], {})[row["what"], row["metric"]] = row
    return models


def _tasks(rows: dict[tuple[str, str], Any], examples: int) -> str:
    mean = rows.get((f"mean of 6 tasks {examples}-shot", "acc"))
    if mean is None:
        return ""
    value = f"{100 * mean['value']:.2f}"
    if "difference" not in mean:
        return value
    half = (mean["difference_high"] - mean["difference_low"]) / 2
    return f"{value} ({100 * mean['difference']:+.2f} ± {100 * half:.2f})"


def _line(name: str, rows: dict[tuple[str, str], Any], shots: Sequence[int]) -> str:
    cells = [f"{rows['KV cache', 'bytes a token']['value']:,.0f}"]
    for length in (1024, 2048, 4096, 8192):
        cells.append(f"{rows[f'perplexity wikitext2 L{length}', 'perplexity']['value']:.2f}")
    if name == "teacher":
        cells += ["", ""]
    else:
        agreement = [rows["agreement wikitext2 L2048", what] for what in ("top1", "kl")]
        cells += [f"{agreement[0]['value']:.1%}", f"{agreement[1]['value']:.3f}"]
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
    text = (ROOT / "docs" / "training.md").read_text()
    models = _models(f"training_{result}_h200.json")
    assert set(models) == {*words, "teacher"}
    for name, label in words.items():
        assert f"| {label} | {_line(name, models[name], shots)} |" in text, name


def test_models_of_two_machines_stand_beside_one_teacher() -> None:
    results = ("training_smollm2_h200.json", "training_smollm2_further_h200.json")
    first, second = (_line("teacher", _models(name)["teacher"], ()) for name in results)
    assert first == second


@pytest.mark.parametrize(("result", "words"), [("", ABLATION), ("_layers", LAYERS)])
def test_the_table_of_the_ablation_is_that_of_the_result(
    result: str, words: dict[str, str]
) -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    models = _models(f"training_ablation{result}_h200.json")
    last = {
        row["case"].split()[-1]: row["value"]
        for row in _rows(f"training_ablation{result}_h200.json")
        if row["metric"] == "KL to the teacher"
    }
    assert set(last) == set(words)
    teacher = models["teacher"]["perplexity wikitext2 L2048", "perplexity"]["value"]
    for name, label in words.items():
        value = models[name]["perplexity wikitext2 L2048", "perplexity"]["value"]
        agreement = [models[name]["agreement wikitext2 L2048", what] for what in ("top1", "kl")]
        same, kl = (row["value"] for row in agreement)
        cells = [label, f"{value:,.2f}", f"{value / teacher - 1:.1%}", f"{same:.1%}", f"{kl:.3f}"]
        assert f"| {' | '.join([*cells, f'{last[name]:.3f}'])} |" in text, name


def test_the_table_of_the_demo_is_that_of_the_result() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    table = text[text.index("### The edit of the demo") : text.index("### On two CPU cores")]
    models = _models("training_demo_cpu.json")
    for (what, _), row in models["kept"].items():
        if tokens := re.search(r"after (\d+)-(\d+) tokens", what):
            words = [f"{int(end):,}" for end in tokens.groups()]
            other = models["sinks"][what, row["metric"]]
            cells = [f"{words[0]} to {words[1]}"]
            for one in (row, other):
                half = (one["high"] - one["low"]) / 2
                cells.append(f"{one['value']:+.3f} ± {half:.3f}" if one["value"] else "0")
            assert f"| {' | '.join(cells)} |" in table, what
        elif what.startswith("perplexity"):
            assert f"{row['value']:.2f}" in table
            assert f"{models['teacher'][what, row['metric']]['value']:.2f}" in table
            assert f"{models['sinks'][what, row['metric']]['value']:.2f}" in table


def test_the_table_of_mlas_start_is_that_of_the_result() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    table = text[text.index("### What MLA's start") : text.index("### The edit of the demo")]
    for row in _rows("training_mla_start_cpu.json"):
        mean = row["metric"] in ("KL to the teacher", "relative squared error")
        if mean or "stage2-3e-4" in row["case"]:
            assert f"{row['value']:.3f}" in table, row
