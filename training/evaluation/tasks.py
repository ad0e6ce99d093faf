"""Log-likelihood tasks through the lm-evaluation-harness: local files, or tasks of its hub by name.

A local task is a JSON-lines file whose records have one of three shapes: ``query``, ``choices``,
``gold`` (multiple choice); ``context_options``, ``continuation``, ``gold`` (the context is what is
chosen); ``context``, ``continuation`` (a last word). Each becomes a task description for the
harness; nothing of the scoring is done here.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.evaluation.intervals import Estimate, Z, mean_of
from vllm_attnedit.errors import AttnEditError

PREFIX = "local_"
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Score:
    """A task's score.

    Attributes:
        estimate: mean with its interval.
        samples: of every question in a fixed order; empty where the harness gives none.
    """

    estimate: Estimate
    samples: tuple[float, ...]


def task_description(name: str, file: Path) -> dict[str, Any]:
    """The harness's description of a local task file.

    Raises:
        AttnEditError: if its records have none of the known shapes.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            record = json.loads(next(lines))
    except (OSError, ValueError, StopIteration) as error:
        raise AttnEditError("evaluate.task_files", file, f"give JSON lines ({error})") from error
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
    if {"query", "choices", "gold"} <= record.keys():
        return found | {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query.strip()}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": accuracy,
        }
    if {"context_options", "continuation", "gold"} <= record.keys():
        return found | {
            "output_type": "multiple_choice",
            "doc_to_text": "{{gold}}",
            "doc_to_choice": "{{context_options}}",
            "doc_to_target": "{{continuation}}",
            "metric_list": accuracy[:1],
        }
    if {"context", "continuation"} <= record.keys():
        return found | {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{continuation}}",
            "metric_list": accuracy[:1],
        }
    fix = (
        "give records with query, choices, gold; context_options, continuation, gold; or context, "
    )
    raise AttnEditError("evaluate.task_files", f"{file}: {sorted(record)}", f"{fix}continuation")


def local_tasks(folder: str | None, names: Sequence[str]) -> dict[str, Path]:
    """The files behind those names that are local tasks."""
    if folder is None:
        return {}
    if not Path(folder).is_dir():
        raise AttnEditError("evaluate.task_files", folder, "give a folder of .jsonl task files")
    return {name: file for name in names if (file := Path(folder) / f"{name}.jsonl").is_file()}


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    folder: str | None,
    shots: int,
    limit: int | None,
    batch: int,
    seed: int,
) -> dict[tuple[str, str], Score]:
    """Scores by task and metric.

    Args:
        model: on its device.
        tokenizer: of the model.
        names: of tasks.
        folder: of local task files.
        shots: examples in every prompt.
        limit: questions of each task.
        batch: sequences of one forward pass.
        seed: of the choice of examples.

    Raises:
        AttnEditError: for a name that is neither a local file nor a task of the harness.
    """
    # Seconds to import.
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    local = local_tasks(folder, names)
    with tempfile.TemporaryDirectory() as descriptions:
        for name, file in local.items():
            text = yaml.safe_dump(task_description(name, file))
            (Path(descriptions) / f"{name}.yaml").write_text(text, encoding="utf-8")
        # Reading the harness's own thousands of descriptions takes seconds.
        others = len(local) < len(set(names))
        manager = TaskManager(include_path=descriptions, include_defaults=others)
        wanted = [PREFIX + name if name in local else name for name in names]
        for name in wanted:
            if name not in manager.all_tasks:
                fix = (
                    "name a .jsonl file of evaluate.task_files, or a task of lm-evaluation-harness"
                )
                raise AttnEditError("evaluate.tasks", name, fix)
        lm = HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch,
            max_length=model.config.max_position_embeddings,
        )  # fmt: skip
        results = simple_evaluate(
            model=lm,
            tasks=wanted,
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=0,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return _scores(results)


def _scores(results: Any) -> dict[tuple[str, str], Score]:
    scores: dict[tuple[str, str], Score] = {}
    for task, values in results["results"].items():
        name = task.removeprefix(PREFIX)
        samples = sorted(results.get("samples", {}).get(task, []), key=lambda s: s["doc_id"])
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if "stderr" in metric or kind != "none" or not isinstance(value, int | float):
                continue
            numbers = [s[metric] for s in samples if isinstance(s.get(metric), int | float)]
            if numbers and len(numbers) == len(samples):
                observed = tuple(float(number) for number in numbers)
                scores[name, metric] = Score(mean_of(observed), observed)
                continue
            error = values.get(f"{metric}_stderr,none")
            spread = Z * error if isinstance(error, int | float) else None
            low = None if spread is None else value - spread
            high = None if spread is None else value + spread
            scores[name, metric] = Score(Estimate(float(value), low, high, len(samples)), ())
    return scores
