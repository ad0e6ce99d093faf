"""Log-likelihood tasks through the lm-evaluation-harness: local files, or tasks of its hub by name.

Local tasks become task descriptions for the harness; nothing of the scoring is done here.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.evaluation.intervals import Estimate, Z, mean_of, share_of
from training.evaluation.local import PREFIX, local_tasks, task_description, task_records
from vllm_attnedit.errors import AttnEditError


@dataclass(frozen=True)
class Score:
    """A task's score.

    Attributes:
        estimate: mean with its interval.
        samples: of every question in a fixed order; empty where the harness gives none.
    """

    estimate: Estimate
    samples: tuple[float, ...]


def check_tasks(names: Sequence[str], folder: str | None, fewshot: Sequence[int]) -> None:
    """Refuse what cannot be measured, before anything is.

    Args:
        names: of tasks.
        folder: of local task files.
        fewshot: numbers of examples.

    Raises:
        AttnEditError: for a name that is no task, and a file that cannot be used as one.
    """
    local = local_tasks(folder, names)
    for file in local.values():
        count = len(task_records(file))
        if count <= max(fewshot, default=0):
            fix = f"give fewer than {count}: {file} has {count} questions"
            raise AttnEditError("evaluate.fewshot", max(fewshot), fix)
    if len(local) < len(set(names)):
        # Seconds to import, and to read thousands of descriptions.
        from lm_eval.tasks import TaskManager

        known = TaskManager().all_tasks
        for name in names:
            if name not in local and name not in known:
                fix = (
                    "name a .jsonl file of evaluate.task_files, or a task of lm-evaluation-harness"
                )
                raise AttnEditError("evaluate.tasks", name, fix)


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
        names: of tasks, as :func:`check_tasks` takes them.
        folder: of local task files.
        shots: examples in every prompt.
        limit: questions of each task.
        batch: sequences of one forward pass.
        seed: of the choice of examples.

    Raises:
        AttnEditError: for data that cannot be loaded.
    """
    # Seconds to import.
    from datasets.exceptions import DatasetNotFoundError
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
        lm = HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch,
            max_length=model.config.max_position_embeddings,
        )  # fmt: skip
        try:
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
        except (OSError, DatasetNotFoundError) as error:  # ConnectionError is an OSError
            fix = f"check the network and HF_HUB_OFFLINE: {' '.join(str(error).split())}"
            raise AttnEditError("evaluate.tasks", ", ".join(names), fix) from error
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
                scores[name, metric] = Score(_estimate(observed), observed)
                continue
            error = values.get(f"{metric}_stderr,none")
            spread = Z * error if isinstance(error, int | float) else None
            low = None if spread is None else value - spread
            high = None if spread is None else value + spread
            scores[name, metric] = Score(Estimate(float(value), low, high, len(samples)), ())
    return scores


def _estimate(observed: tuple[float, ...]) -> Estimate:
    # The normal approximation gives a task without a hit an interval of no width.
    if set(observed) <= {0.0, 1.0}:
        return share_of(int(sum(observed)), len(observed))
    return mean_of(observed)
