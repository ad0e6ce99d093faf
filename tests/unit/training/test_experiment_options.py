"""An experiment's file: what is taken, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.provenance import ROOT
from benchmarks.training.command import run_experiment
from benchmarks.training.layout import Layout
from benchmarks.training.loading import load_experiment
from benchmarks.training.plan import Plan
from vllm_attnedit.errors import AttnEditError

EXPERIMENTS = sorted((ROOT / "benchmarks" / "training" / "experiments").glob("*.yaml"))


def small() -> dict:
    return {
        "options": {"teacher": "teacher", "data": {"shards": "shards"}},
        "runs": [
            {
                "name": "a",
                "student": {"target": "gateswa", "window": 8, "full_layers": "chosen"},
                "stage1": {"tokens": "1e6", "lr": "1e-3"},
                "stage2": {"tokens": "2e6", "lr": "5e-4", "cosine_weight": 0.1},
            },
            {"name": "b", "after": "a", "stage2": {"tokens": 10, "lr": 1}},
        ],
        "baselines": [{"name": "sinks", "sinks": 4}],
    }


def write(folder: Path, data: dict) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def plan_of(folder: Path, data: dict, overrides=()) -> Plan:
    experiment = load_experiment(write(folder, data), overrides)
    return Plan(experiment, Layout(folder / "out", folder / "work"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_committed_experiments_are_complete(path, tmp_path):
    plan = Plan(load_experiment(path), Layout(tmp_path / "out", tmp_path / "work"))
    # Where nothing starts from chosen layers, the choice is nobody's task.
    chosen = any("choose" in task.needs for task in plan.tasks.values())
    idle = set() if chosen else {"choose"}
    assert [task.name for task in plan.missing()] == [n for n in plan.tasks if n not in idle]
    for run in plan.experiment.runs:
        assert f"{run.name}@{list(run.stages)[-1]}" in plan.tasks


def test_the_long_experiment_trains_as_long_as_it_should():
    (path,) = [path for path in EXPERIMENTS if path.stem == "smollm2"]
    runs = {run.name: run for run in load_experiment(path).runs}
    for name in ("gateswa-inherit", "mla-inherit"):
        assert sum(stage.tokens for stage in runs[name].stages.values()) >= 150e6


def test_a_stage_gets_its_options(tmp_path):
    plan = plan_of(tmp_path, small(), ["--optim.batch", "16", "--evaluate.label", "tiny"])
    first, second = plan.experiment.runs
    stage1 = plan.models.stage_config(first, "stage1")
    stage2 = plan.models.stage_config(first, "stage2")
    assert (stage1.optim.tokens, stage1.stage1.lr, stage1.optim.batch) == (1e6, 1e-3, 16)
    assert (stage2.optim.tokens, stage2.stage2.lr, stage2.stage2.cosine_weight) == (2e6, 5e-4, 0.1)
    assert stage2.output == str(tmp_path / "work" / "runs" / "a" / "stage2")
    assert plan.models.source(second, "stage2") == Path(stage2.output) / "model"
    assert plan.label == "tiny"


def test_tasks_need_what_they_start_from(tmp_path):
    plan = plan_of(tmp_path, small())
    (edit,) = [name for name in plan.tasks if name.startswith("edit@")]
    needs = {name: task.needs for name, task in plan.tasks.items()}
    assert needs[edit] == ("choose",)
    assert needs["a@stage1"] == ("tokenize", edit)
    assert needs["a@stage2"] == ("tokenize", "a@stage1")
    assert needs["b@stage2"] == ("tokenize", "a@stage2")
    # The default layers of a baseline need no choice; only what is asked for is missing.
    assert plan.missing(["sinks"]) == []
    assert "b@stage2" not in [task.name for task in plan.missing(["a"])]
    assert "a@stage2" in [task.name for task in plan.missing(["b"])]


def test_a_first_stage_stays_packed_until_the_run_is(tmp_path):
    plan = plan_of(tmp_path, small() | {"pack": {"keep": "all"}})
    first, last = (plan.tasks[f"a@stage{number}@pack"] for number in (1, 2))
    folders = [plan.layout.packed("a", f"stage{number}") for number in (1, 2)]
    for folder, task in zip(folders, (first, last)):
        assert not task.done()
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
        assert task.done()
        assert folders[0].is_dir()
        task.ended(tmp_path, 1.0)
    assert [folder.is_dir() for folder in folders] == [False, True]
    assert first.done()


def _change(where: list, value: object) -> dict:
    data = small()
    node: Any = data
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_change(["runs", 0, "windw"], 3), ["runs.0.windw", "nearest"]),
        (_change(["runs", 0, "window"], 3), ["runs.0.window", "runs.N.student.window"]),
        (_change(["runs", 0, "student", "target"], "gatesw"), ["student.target", "gateswa, mla"]),
        (_change(["runs", 1, "after"], "aa"), ["runs.b.after", "aa", "nearest is a"]),
        (_change(["runs", 0, "stage1", "lr"], 0), ["runs.a", "stage1.lr", "above 0"]),
        (_change(["runs", 0, "after"], "b"), ["runs.a", "student and after", "give it one"]),
        (_change(["runs", 1, "after"], None), ["runs.b", "no start", "student, edit and after"]),
        (_change(["runs", 0, "edit"], "x"), ["runs.a", "student and edit"]),
        (
            _change(["runs", 0], {"name": "a", "edit": "none.safetensors"}),
            ["runs.a.edit: none.safetensors", "give the file of an edit"],
        ),
        (_change(["runs", 1, "stage2"], None), ["runs.b", "no stage"]),
        (_change(["runs", 1, "name"], "a"), ["name: a", "of its own"]),
        (_change(["runs", 1, "name"], "B c"), ["name: B c", "a-z"]),
        (_change(["runs", 0, "student", "kv_lora_rank"], 8), ["runs.a", "--target mla"]),
        (_change(["options", "optim"], {"tokns": 3}), ["options", "optim.tokns", "optim.tokens"]),
        (_change(["baselines", 0, "full_layers"], "x"), ["baselines.sinks", "indices"]),
        (_change(["seconds"], {"safe": 3}), ["seconds.safe", "seconds.save"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, data, said):
    with pytest.raises(AttnEditError) as refused:
        load_experiment(write(tmp_path, data))
    assert "\n" not in str(refused.value)
    for words in said:
        assert words in str(refused.value)


def test_bad_calls_are_refused_before_anything_is_done(tmp_path):
    path, out = write(tmp_path, small()), tmp_path / "out"
    for options, said in (
        ({"only": ["sink"]}, "nearest is sinks"),
        ({"devices": "0,,1"}, "--devices: 0,,1"),
        ({"overrides": ["--budgett", "3"]}, "unknown key: budgett"),
    ):
        with pytest.raises(AttnEditError, match=said):
            run_experiment(path, out, **options)
    with pytest.raises(AttnEditError, match="give a YAML file"):
        run_experiment(tmp_path / "none.yaml", out)
    assert not out.exists()
