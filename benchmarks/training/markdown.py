"""The report for people."""

from __future__ import annotations

from typing import Any

from benchmarks.training.options import TEACHER
from benchmarks.training.plan import Plan
from benchmarks.training.runner import failures
from benchmarks.training.stages import read_result, speed
from training.evaluation.report import cell

FIGURE = "loss.png"


def write_markdown(
    plan: Plan, rows: list[dict[str, Any]], provenance: dict[str, Any], figure: bool
) -> str:
    """Runs, scores (a model a line), rivals, failures."""
    lines = [f"# Training experiment: {plan.label}", ""]
    lines += [f"{provenance['date']}, {provenance['machine']}, commit {provenance['commit']}", ""]
    lines += [f"`{provenance['command']}`", ""]
    lines += _runs(plan)
    lines += _times(plan)
    quality = [row for row in rows if "variant" in row]
    lines += _scores(quality)
    lines += _rivals(quality)
    failed = failures(plan.layout)
    if failed:
        lines += ["## Failures", ""]
        lines += [f"- `{one['task']}`: {_one_line(one['text'])}" for one in failed]
        lines.append("")
    if figure:
        lines += ["## Loss", "", f"![loss against tokens]({FIGURE})", ""]
    return "\n".join(lines)


def _runs(plan: Plan) -> list[str]:
    head = ["run", "edit", "stage", "state", "tokens", "minutes", "parts", "tok/s", "bf16 peak"]
    head += ["KV B/token", "loss first → last", "KL first → last"]
    failed = {one["task"] for one in failures(plan.layout)}
    lines = ["## Runs", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for run in plan.experiment.runs:
        result = read_result(plan.layout, run.name)
        edit = result.get("edit", {})
        for stage, spec in run.stages.items():
            known = result.get("stages", {}).get(stage)
            cells = [run.name, str(edit.get("words", "")), stage]
            if known is None:
                cells += ["not begun", f"0 of {spec.tokens / 1e6:.4g}M", *[""] * 7]
            else:
                rate, mfu = speed(known)
                cells += [
                    "failed" if f"{run.name}@{stage}" in failed else known["state"],
                    f"{known['tokens'] / 1e6:.4g}M of {spec.tokens / 1e6:.4g}M",
                    f"{known['seconds'] / 60:.1f}",
                    str(known["parts"]),
                    "" if rate is None else f"{rate:,.0f}",
                    "" if mfu is None else f"{mfu:.1%}",
                    f"{edit['kv_bytes_per_token']:,}",
                    _from_to(known, "loss"),
                    _from_to(known, "kl"),
                ]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", _READING, ""]


def _times(plan: Plan) -> list[str]:
    """Where the time of traced steps went."""
    traced = [
        (f"{run.name} {stage}", known["shares"])
        for run in plan.experiment.runs
        for stage, known in read_result(plan.layout, run.name).get("stages", {}).items()
        if known.get("shares")
    ]
    if not traced:
        return []
    kinds = sorted({kind for _, shares in traced for kind in shares})
    kinds.sort(key=lambda kind: -sum(shares.get(kind, 0.0) for _, shares in traced))
    lines = ["## Where a step's time goes", ""]
    lines += ["| traced | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for name, shares in traced:
        cells = [f"{shares.get(kind, 0.0):.1%}" for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


_READING = (
    "Minutes are those of the processes, start included; tokens a second and the share of the "
    "bf16 peak leave out a part's first line, which is the compiler's. First and last are means of "
    "5 and of 20 steps."
)


def _from_to(known: dict[str, Any], name: str) -> str:
    first, last = known["first"].get(name), known["last"].get(name)
    if last is None:
        return ""
    return f"{last:.4f}" if first is None else f"{first:.4f} → {last:.4f}"


def _scores(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["## Scores", ""]
    lines += [
        "Value ± half of the 95% interval; below it, the difference from the teacher with its"
    ]
    lines += ["interval over the same questions, where there is one. Shares are in percent.", ""]
    keys = list(dict.fromkeys((row["what"], row["metric"]) for row in rows))
    names = list(dict.fromkeys((row["variant"], _model(row)) for row in rows))
    by_key = {(row["variant"], row["what"], row["metric"]): row for row in rows}
    heads = [f"{what}<br>{metric}" for what, metric in keys]
    lines += ["| name | model | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(keys)]
    for name, words in names:
        cells = [cell(by_key.get((name, what, metric))) for what, metric in keys]
        lines.append(f"| {name} | {words} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _model(row: dict[str, Any]) -> str:
    words = str(row["case"]).removesuffix(str(row["what"])).split(" ", 2)[2].strip()
    return "" if words == TEACHER else words.removesuffix(f" {row['variant']}")


def _rivals(rows: list[dict[str, Any]]) -> list[str]:
    lost = [row for row in rows if row.get("beats_training_free") is False]
    compared = [row for row in rows if "beats_training_free" in row]
    if not compared:
        return []
    lines = ["## Against what needs no training", ""]
    lines.append(
        f"{len(compared) - len(lost)} of {len(compared)} values are better than the best "
        "training-free rival's."
    )
    lines += ["", *(_loss_line(row) for row in lost if not row["variant"].endswith("@untrained"))]
    return [*lines, ""]


def _loss_line(row: dict[str, Any]) -> str:
    ratio = row["ratio_to_training_free"]
    shown = "" if ratio is None else f", {ratio:.3f} times its value"
    return f"- {row['variant']}: {row['what']} {row['metric']}: not better than " + (
        f"{row['training_free']}{shown}"
    )


def _one_line(text: Any) -> str:
    lines = str(text).strip().splitlines()
    return lines[-1][:300] if lines else "no output"
