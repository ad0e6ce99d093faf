"""Tasks in local files, and how the lm-evaluation-harness is told of them.

A local task is a JSON-lines file whose records have one of three shapes: ``query``, ``choices``,
``gold`` (multiple choice); ``context_options``, ``continuation``, ``gold`` (the context is what is
chosen); ``context``, ``continuation`` (a last word).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_attnedit.errors import AttnEditError

PREFIX = "local_"
METRICS = ("acc", "acc_norm")
SHAPES = (
    ("query", "choices", "gold"),
    ("context_options", "continuation", "gold"),
    ("context", "continuation"),
)
"""Fields of a local task's records."""


def task_description(name: str, file: Path) -> dict[str, Any]:
    """The harness's description of a local task file.

    Raises:
        AttnEditError: if its records have none of the known shapes.
    """
    record = task_records(file)[0]
    found: dict[str, Any] = {
        "task": PREFIX + name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        # Examples come from the same file; the harness never shows a question to itself.
        "fewshot_split": "test",
        "target_delimiter": " ",
        "fewshot_delimiter": "\n\n",
        "metadata": {"version": 1},
    }
    accuracy = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS]
    if "query" in record:
        return found | {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query.strip()}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": accuracy,
        }
    if "context_options" in record:
        return found | {
            "output_type": "multiple_choice",
            "doc_to_text": "{{gold}}",
            "doc_to_choice": "{{context_options}}",
            "doc_to_target": "{{continuation}}",
            "metric_list": accuracy[:1],
        }
    return found | {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        # Between a question and what is scored the harness puts its delimiter for choices only.
        "doc_to_target": "{{' ' + continuation}}",
        "target_delimiter": "",
        "metric_list": accuracy[:1],
    }


def task_records(file: Path) -> list[dict[str, Any]]:
    """The questions of a local task file, all of one of the known shapes.

    Raises:
        AttnEditError: naming the first line that is none.
    """
    try:
        # Not splitlines, which also cuts at characters that JSON may hold.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AttnEditError("evaluate.task_files", file, f"give JSON lines ({error})") from error
    records: list[dict[str, Any]] = []
    shape: Sequence[str] = ()
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise AttnEditError("evaluate.task_files", where, f"give JSON ({error})") from error
        keys = record.keys() if isinstance(record, dict) else ()
        shape = shape or next((s for s in SHAPES if set(s) <= set(keys)), ())
        if not shape or not set(shape) <= set(keys):
            known = "; ".join(", ".join(s) for s in ([shape] if shape else SHAPES))
            fix = f"give records with {known}"
            raise AttnEditError("evaluate.task_files", f"{where}: {sorted(keys)}", fix)
        options = record.get("choices", record.get("context_options", ()))
        if "gold" in shape and record["gold"] not in range(len(options)):
            fix = f"give gold as a number from 0 to {len(options) - 1}"
            raise AttnEditError("evaluate.task_files", f"{where}: gold {record['gold']}", fix)
        records.append(record)
    if not records:
        raise AttnEditError("evaluate.task_files", file, "give JSON lines: it is empty")
    return records


def local_tasks(folder: str | None, names: Sequence[str]) -> dict[str, Path]:
    """The files behind those names that are local tasks."""
    if folder is None:
        return {}
    if not Path(folder).is_dir():
        raise AttnEditError("evaluate.task_files", folder, "give a folder of .jsonl task files")
    return {name: file for name in names if (file := Path(folder) / f"{name}.jsonl").is_file()}
