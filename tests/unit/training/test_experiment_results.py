"""What is kept of runs and measurements, and the report that is made of nothing else."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.training import report
from benchmarks.training.layout import Layout
from benchmarks.training.loading import load_experiment
from benchmarks.training.measure import Job, measure, settings
from benchmarks.training.packing import MANIFEST, pack, unpack
from benchmarks.training.plan import Plan
from benchmarks.training.rows import add_rivals, quality_rows, training_rows
from benchmarks.training.stages import record
from tests.unit.training.small import small_config
from training import tracing
from training.evaluation.suite import run_suite
from training.runs import train
from training.tracing import TRACE
from vllm_attnedit.edit import save_edit
from vllm_attnedit.errors import AttnEditError

STEPS = 6


@pytest.fixture
def plan(tmp_path, pair, text) -> Plan:
    """One run from an edit that is there already, and one baseline like it."""
    options = asdict(small_config(tmp_path, *pair, text))
    options["evaluate"] |= {
        "label": "tiny", "perplexity": {"words": str(text)}, "lengths": [64],
        "agreement_length": 64, "max_windows": 6,
        "passkey": {"lengths": [256], "depths": [0.0, 1.0], "trials": 2},
    }  # fmt: skip
    for name in ("student", "output"):
        options.pop(name)
    data = {
        "options": options,
        "runs": [
            {
                "name": "mine",
                "student": {"target": "gateswa", "window": 8, "full_layers": "3"},
                "stage2": {"tokens": STEPS * 4 * 64, "lr": 1e-3},
            }
        ],
        "baselines": [{"name": "sinks", "window": 8, "full_layers": "3", "sinks": 4}],
    }
    path = tmp_path / "experiment.json"  # JSON is YAML
    path.write_text(json.dumps(data))
    plan = Plan(load_experiment(path), Layout(tmp_path / "out", tmp_path / "work"))
    edit = plan.models.edit(plan.experiment.runs[0])
    assert edit is not None
    shutil.copytree(pair[1], edit)
    return plan


def take_part(plan: Plan, seconds: float, **minutes: float) -> Any:
    run = plan.experiment.runs[0]
    config = plan.models.stage_config(run, "stage2", plan.models.source(run, "stage2"))
    for name, value in minutes.items():
        setattr(config.run, name, value)
    train(config, "stage2")
    record(plan.layout, "mine", "stage2", plan.models.origin(run), config, seconds)
    return json.loads(plan.layout.result("mine").read_text())["stages"]["stage2"]


def measure_all(plan: Plan) -> None:
    for task in plan.missing():
        if task.name.startswith("measure@"):
            job = json.loads(Path(task.command()[-1]).read_text())
            measure(Job(**job))
            assert task.done()


def test_parts_of_a_run_add_up(plan):
    part = take_part(plan, 10.0, minutes=1e-9)
    assert (part["state"], part["step"], part["tokens"], part["parts"]) == ("stopped", 1, 256, 1)
    whole = take_part(plan, 20.0)
    assert (whole["state"], whole["step"], whole["steps"]) == ("finished", STEPS, STEPS)
    assert (whole["parts"], whole["seconds"], whole["tokens"]) == (2, 30.0, STEPS * 256)
    assert [point["tokens"] for point in whole["curve"]] == [256 * (i + 1) for i in range(STEPS)]
    assert whole["curve"][0] == part["curve"][0]
    mean = sum(point["kl"] for point in whole["curve"]) / STEPS
    assert whole["last"]["kl"] == pytest.approx(mean)
    # The first part took one step: it says nothing of speed.
    (speed,) = whole["speeds"]
    (row,) = [row for row in training_rows(plan) if row["unit"] == "tok/s"]
    assert row["value"] == pytest.approx(speed["tokens"] / speed["seconds"])
    assert row["case"] == "training tiny gateswa W8 full 3 inherit stage2 B4 L64 mine"
    assert plan.tasks["mine@stage2"].done()


def test_a_curve_goes_on_where_its_first_part_is_lost(plan):
    part = take_part(plan, 10.0, minutes=1e-9)
    metrics = plan.layout.stage("mine", "stage2") / "metrics.jsonl"
    metrics.unlink()
    whole = take_part(plan, 10.0)
    assert json.loads(metrics.read_text().splitlines()[0])["step"] == 2
    assert [point["tokens"] for point in whole["curve"]] == [256 * (i + 1) for i in range(STEPS)]
    assert whole["curve"][0] == part["curve"][0]
    assert whole["first"] == part["first"]


def test_a_traced_run_says_where_its_time_goes(plan, monkeypatch):
    monkeypatch.setattr(tracing, "WARM_UP", 1)
    part = take_part(plan, 10.0)
    assert part["shares"] is None
    shutil.rmtree(plan.layout.stage("mine", "stage2"))
    plan.layout.result("mine").unlink()
    plan.experiment.options["log"]["profile"] = 2
    shares = take_part(plan, 10.0)["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["GEMM"] > 0 and shares["attention"] > 0
    assert shares["loss over the vocabulary"] > 0
    rows = [row for row in training_rows(plan) if row["metric"].startswith("time of ")]
    assert [row["value"] for row in rows] == list(shares.values())
    stage = plan.layout.stage("mine", "stage2")
    assert [path.name for path in stage.glob("*trace*")] + list(stage.glob(".*trace*")) == [TRACE]
    report.write_report(plan)
    text = (plan.layout.out / "report.md").read_text()
    assert f"| mine stage2 | {max(shares.values()):.1%} |" in text


def test_a_trace_of_nothing_says_nothing(plan):
    folder = plan.layout.stage("mine", "stage2")
    folder.mkdir(parents=True)
    with gzip.open(folder / TRACE, "wt") as file:
        json.dump({"traceEvents": []}, file)
    assert take_part(plan, 10.0)["shares"] is None


@pytest.mark.parametrize(("higher", "best", "beats"), [(True, "b", False), (False, "a", True)])
def test_the_best_rival_is_the_one_to_beat(higher, best, beats):
    common = {"what": "w", "metric": "m", "unit": "u", "higher_is_better": higher}
    rows = [common | {"variant": v, "value": x} for v, x in
            (("teacher", 9), ("a", 2), ("b", 4), ("mine", 1))]  # fmt: skip
    add_rivals(rows, ["a", "b"])
    assert "training_free" not in rows[0] | rows[1]
    assert rows[3]["training_free"] == best
    assert rows[3]["ratio_to_training_free"] == 1 / rows[2 if higher else 1]["value"]
    assert rows[3]["beats_training_free"] is beats


def test_a_run_can_start_from_an_edit_that_is_there(plan, pair, tmp_path):
    take_part(plan, 1.0)
    file = tmp_path / "edit.safetensors"
    save_edit(plan.models.result(plan.experiment.runs[0]), file)
    data = json.loads((tmp_path / "experiment.json").read_text())
    stage2 = {"tokens": 256, "lr": 1e-3}
    data["runs"] = [{"name": "more", "edit": str(file), "stage2": stage2, "untrained": ["text"]}]
    path = tmp_path / "more.json"
    path.write_text(json.dumps(data))
    plan = Plan(load_experiment(path), Layout(tmp_path / "more", tmp_path / "work"))
    (apply,) = [task for task in plan.tasks.values() if task.kind == "edit"]
    assert "choose" not in apply.needs
    assert plan.tasks["more@stage2"].needs == ("tokenize", apply.name)
    assert plan.tasks["measure@more@untrained@text"].needs == (apply.name,)
    assert not apply.done()
    subprocess.run(apply.command(), check=True, capture_output=True)
    assert apply.done()
    start = plan.models.source(plan.experiment.runs[0], "stage2")
    mine = load_file(start / "model.safetensors")
    theirs = load_file(tmp_path / "work/runs/mine/stage2/model/model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    # Another edit in the same file is another start.
    before = plan.models.origin(plan.experiment.runs[0])
    save_edit(pair[1], tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(file)
    assert plan.models.origin(plan.experiment.runs[0]) != before


def test_a_run_that_changed_is_refused(plan, tmp_path):
    take_part(plan, 1.0, minutes=1e-9)
    changed = json.loads((tmp_path / "experiment.json").read_text())
    changed["runs"][0]["stage2"]["lr"] = 1e-4
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    with pytest.raises(AttnEditError, match=r"runs.mine: stage2.lr.*began with 0.001"):
        Plan(load_experiment(path), plan.layout)
    changed["runs"][0]["stage2"]["lr"] = 1e-3
    changed["runs"][0]["student"]["window"] = 16
    path.write_text(json.dumps(changed))
    with pytest.raises(AttnEditError, match="set it back or give the run another name"):
        Plan(load_experiment(path), plan.layout)


def test_values_are_those_of_the_suite(plan, tmp_path):
    take_part(plan, 1.0)
    measure_all(plan)
    config = plan.models.measure
    config.student = str(plan.models.edit(plan.experiment.runs[0]))
    config.evaluate.models = {"mine": str(plan.models.result(plan.experiment.runs[0]))}
    config.evaluate.baselines, config.evaluate.sinks = ["sinks"], 4
    expected = json.loads((run_suite(config) / "report.json").read_text())["rows"]
    found = quality_rows(plan)
    key = lambda row: (row["variant"], row["what"], row["metric"])  # noqa: E731
    assert sorted(map(key, found)) == sorted(map(key, expected))
    mine = {key(row): row for row in found}
    for row in expected:
        for name in ("value", "low", "high", "ratio", "difference", "count"):
            known = row.get(name)
            assert mine[key(row)].get(name) == (known and pytest.approx(known, rel=1e-5))
    (row,) = [row for row in found if row["variant"] == "mine" and row["metric"] == "perplexity"]
    rival = mine[("sinks", row["what"], "perplexity")]
    assert row["training_free"] == "sinks"
    assert row["ratio_to_training_free"] == row["value"] / rival["value"]
    assert row["beats_training_free"] == (row["value"] < rival["value"])


def test_the_report_needs_no_checkpoints(plan, monkeypatch):
    take_part(plan, 60.0)
    measure_all(plan)
    monkeypatch.setattr(report, "provenance", lambda **_: dict.fromkeys(
        ("date", "machine", "commit", "command"), "known"))  # fmt: skip
    report.write_report(plan)
    before = json.loads((plan.layout.out / "report.json").read_text())
    shutil.rmtree(plan.layout.work)
    report.write_report(plan)
    after = json.loads((plan.layout.out / "report.json").read_text())
    assert after["rows"] == before["rows"]
    assert len(before["rows"]) > 10
    text = (plan.layout.out / "report.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| mine |"))
    assert (
        "| gateswa W8 full 3 inherit | stage2 | finished | 0.001536M of 0.001536M | 1.0 |" in line
    )
    assert "Against what needs no training" in text
    assert (plan.layout.out / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_whose_model_is_lost_is_trained_again_only_for_who_needs_it(plan):
    take_part(plan, 60.0)
    measure_all(plan)
    shutil.rmtree(plan.layout.work)
    assert plan.missing() == []
    plan.layout.measured("mine", "text").unlink()
    names = [task.name for task in plan.missing()]
    assert names[-2:] == ["mine@stage2", "measure@mine@text"]
    assert "mine@stage2@pack" not in names


def test_what_is_measured_otherwise_is_measured_again(plan):
    config = plan.models.measure
    before = {part: settings(config, part) for part in ("text", "passkey", "tasks-0")}
    assert len(set(before.values())) == 3
    config.evaluate.max_windows = 7
    assert settings(config, "text") != before["text"]
    assert settings(config, "passkey") == before["passkey"]
    # Where a file lies says nothing of what it holds.
    config.evaluate.max_windows = 6
    config.evaluate.perplexity = {"words": "elsewhere.txt"}
    assert settings(config, "text") == before["text"]


def test_a_packed_run_is_done_without_its_checkpoints(plan):
    take_part(plan, 1.0)
    pack_task = plan.tasks["mine@stage2@pack"]
    assert not pack_task.done()
    run, limit = plan.experiment.runs[0], 100_000
    model = plan.layout.model("mine", "stage2")
    packed = plan.layout.packed("mine", "stage2")
    pack(plan.models.teacher, model, packed, limit)
    trained = load_file(model / "model.safetensors")
    shutil.rmtree(plan.layout.work / "runs")
    assert pack_task.done()
    assert plan.tasks["mine@stage2"].done()
    assert max(path.stat().st_size for path in packed.iterdir()) <= limit
    assert len(list(packed.glob("edit.safetensors.*"))) > 1
    again = load_file(plan.models.result(run) / "model.safetensors")
    assert again.keys() == trained.keys()
    for name, tensor in trained.items():
        # int8 differences: half a level of the largest change of a row.
        assert (again[name] - tensor).abs().max() < 1e-4 if ".self_attn." in name else True
        assert ".self_attn." in name or again[name].equal(tensor)


def test_an_mla_edit_is_packed_bit_for_bit(latent_pair, tmp_path):
    teacher, student = latent_pair
    packed = tmp_path / "packed"
    pack(str(teacher), student, packed, 200_000)
    unpack(str(teacher), packed, tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (student, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    pieces = sorted(packed.glob("edit.safetensors.*"))
    content = bytearray(pieces[1].read_bytes())
    content[1000] ^= 1
    pieces[1].write_bytes(content)
    with pytest.raises(AttnEditError, match="its pieces are damaged"):
        unpack(str(teacher), packed, tmp_path / "damaged")
    pieces[1].unlink()
    with pytest.raises(AttnEditError, match=r"edit\.safetensors\.001"):
        unpack(str(teacher), packed, tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    assert json.loads((packed / MANIFEST).read_text())["compact"] is False


def test_more_than_attention_is_not_packed(plan, tmp_path):
    data = json.loads((tmp_path / "experiment.json").read_text())
    data["runs"][0]["stage2"]["options"] = {"stage2.trainable": "all"}
    data["runs"].append({"name": "next", "after": "mine", "stage2": {"tokens": 1, "lr": 1}})
    path = tmp_path / "all.json"
    path.write_text(json.dumps(data))
    whole = Plan(load_experiment(path), Layout(tmp_path / "o", tmp_path / "w"))
    assert [name for name in whole.tasks if name.endswith("@pack")] == []
    assert asdict(whole.experiment.pack)["keep"] == "results"
