"""Training on one device against several: what is run, what is compared, what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.models import TEACHERS
from benchmarks.scaling import command as scaling_command
from benchmarks.scaling import runs
from benchmarks.scaling.command import compare, make_config, source_of
from benchmarks.scaling.report import distance, rows, speed_of, table
from benchmarks.scaling.runs import RUNS, Scaling, run_all
from tests.unit.tiny import tiny_config
from tests.unit.training.small import make_pair, write_text
from tests.unit.training.test_cli import write_config
from training.options import load_config
from training.progress import read_metrics
from vllm_attnedit.errors import AttnEditError

SIZES = ["--data.sequence_length", "320", "--optim.micro_batch", "1"]
CPU = ["--run.device", "cpu", "--run.precision", "fp32", "--stage2.chunk_tokens", "48"]


@pytest.fixture
def tiny_dims(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of no size among those whose weights are made up."""
    fields = tiny_config("qwen2", tie_word_embeddings=True).to_dict()
    monkeypatch.setitem(TEACHERS, "tiny", {k: v for k, v in fields.items() if v is not None})
    return "tiny"


def made_up(name: str, out: Path, *overrides: str, **more: Any) -> Scaling:
    sizes = {"target": "gateswa", "layers": None, "devices": 2, "steps": 6, "tail": 2} | more
    options = [*SIZES, "--optim.batch", str(sizes["devices"]), *CPU, *overrides]
    config = make_config(name, options, out=out, **sizes)
    return Scaling(config, sizes["devices"], sizes["steps"], sizes["tail"], out)


def test_command_lines_differ_in_devices_and_origin(tiny_dims: str, tmp_path: Path) -> None:
    scaling = made_up(tiny_dims, tmp_path, devices=3)
    commands = {one.name: scaling.command(one, 1.5) for one in RUNS}
    for name, command in commands.items():
        assert command[-2:] == ["--run.minutes", "1.50"]
        assert command[command.index("--output") + 1] == str(tmp_path / "runs" / name)
        sharded = command[command.index("--run.sharding") + 1] == "fsdp2"
        assert (
            sharded
            == ("torch.distributed.run" in command)
            == (name in ("several", "one-to-several"))
        )
    start = commands["several"]
    assert start[start.index("--nproc-per-node") + 1] == "3"
    for name, origin in (("one-to-several", "one"), ("several-to-one", "several")):
        resumed = commands[name][commands[name].index("--checkpoint.resume") + 1]
        assert resumed == str(tmp_path / "runs" / origin / "checkpoints" / "step-00000004")


def test_what_is_made_up_trains(tiny_dims: str, tmp_path: Path, monkeypatch: Any) -> None:
    """In this process: the first run stops for its budget, and is carried on to the same losses.

    Its checkpoint is then resumed; the teacher is no flat distribution, and the edit not the same.
    """
    from training.cli import main

    scaling = made_up(tiny_dims, tmp_path)
    scaling.write_config()

    def train(name: str, *more: str) -> list[dict[str, Any]]:
        one = next(run for run in RUNS if run.name == name)
        command = [*scaling.command(one), *more]
        if one.several:  # here too a single process, but from the other's checkpoint
            command[command.index("fsdp2")] = "none"
        main(command[command.index("stage2") :])
        return read_metrics(scaling.folder(name))

    assert len(train("one", "--run.minutes", "1e-9")) == 1
    assert not scaling.finished("one")
    whole = train("one")
    assert scaling.finished("one")
    assert not (scaling.folder("one") / "model").exists()
    assert all(row["loss"] > 0.01 for row in whole)
    tail = train("one-to-several")
    assert [row["step"] for row in tail] == [5, 6]
    assert [row["loss"] for row in tail] == [row["loss"] for row in whole[4:]]
    found = rows(scaling, "tiny", 1e-3)
    assert [row["case"] for row in found] == [
        "training tiny stage2 B2 L320 fp32 x2 from a checkpoint of x1"
    ]
    assert (found[0]["value"], found[0]["steps"], found[0]["within"]) == (0, 2, True)


def test_curves_are_compared_where_both_have_steps() -> None:
    apart = distance({1: 1.0, 2: 0.5, 3: 0.25}, {2: 0.502, 3: 0.2525, 4: 9.0})
    assert apart is not None
    assert apart["value"] == pytest.approx(0.0025)
    assert (apart["at_step"], apart["steps"]) == (3, 2)
    assert apart["relative"] == pytest.approx(0.01)
    assert (apart["first_loss"], apart["last_loss"]) == (0.5, 0.25)
    assert distance({1: 1.0}, {2: 1.0}) is None


def write_run(scaling: Scaling, name: str, losses: dict[int, float], seconds: float) -> None:
    folder = scaling.folder(name)
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    quartiles = {"median": seconds, "p25": 0.9 * seconds, "p75": 1.1 * seconds}
    for stamp, steps in (("1", 3), ("2", 100), ("3", 7)):
        part = {"steps": steps, "step_seconds": quartiles if steps > 50 else {"median": 9.0}}
        (folder / f"speed-{stamp}.json").write_text(json.dumps(part))
    (folder / "speed-4.json").write_text("{}")  # of a part of a single step


@pytest.mark.parametrize(
    ("loss", "gap", "within"), [(0.5, 9e-4, True), (0.5, 2e-3, False), (0.005, 0.0, None)]
)
def test_rows(tiny_dims: str, tmp_path: Path, loss: float, gap: float, within: Any) -> None:
    """Rates by the median step of the longest part; small losses pass no test."""
    scaling = made_up(tiny_dims, tmp_path)
    write_run(scaling, "one", dict.fromkeys(range(1, 7), loss), 2.0)
    write_run(scaling, "several", dict.fromkeys(range(1, 7), loss + gap), 1.0)
    one, several, curve = rows(scaling, "tiny", 1e-3)
    assert speed_of(scaling.folder("one"))["steps"] == 100  # type: ignore[index]
    assert (one["value"], one["ratio"]) == (pytest.approx(2 * 320 / 2.0), 1.0)
    assert (several["value"], several["ratio"]) == (pytest.approx(2 * 320), 2.0)
    assert several["low"] < several["value"] < several["high"]
    assert {"case", "metric", "value", "unit", "control", "ratio"} <= set(curve)
    assert curve["value"] == pytest.approx(gap)
    assert curve["within"] is within
    assert "2.00 times one device's" in table([one, several, curve])


def test_nothing_is_begun_without_time(tiny_dims: str, tmp_path: Path, monkeypatch: Any) -> None:
    parts: list[float | None] = []
    monkeypatch.setattr(runs, "_run_part", lambda *arguments: parts.append(arguments[-1]))
    scaling = made_up(tiny_dims, tmp_path)
    assert not run_all(scaling, runs.START_S + runs.SAVE_S - 1)
    assert parts == []
    monkeypatch.setattr(Scaling, "finished", lambda _, name: len(parts) >= 4)
    assert run_all(scaling, runs.START_S + runs.SAVE_S + 120)
    assert [round(part or 0) for part in parts] == [2] * 4


def test_one_run_alone(tiny_dims: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not complete by it; none that needs another's checkpoint comes before that other."""
    done: list[str] = []
    monkeypatch.setattr(runs, "_run_part", lambda _scaling, one, _minutes: done.append(one.name))
    monkeypatch.setattr(Scaling, "finished", lambda _, name: name in done)
    scaling = made_up(tiny_dims, tmp_path)
    with pytest.raises(AttnEditError, match=r"one-to-several.*let one end first"):
        run_all(scaling, only=["one-to-several"])
    with pytest.raises(AttnEditError, match=r"--only: two.*several-to-one"):
        run_all(scaling, only=["two"])
    assert not run_all(scaling, only=["one"])
    assert not run_all(scaling, only=["one", "one-to-several"])
    assert done == ["one", "one-to-several"]
    assert run_all(scaling)
    assert done == ["one", "one-to-several", "several", "several-to-one"]


def test_a_folder_holds_one_comparison(tiny_dims: str, tmp_path: Path) -> None:
    made_up(tiny_dims, tmp_path).write_config()
    made_up(tiny_dims, tmp_path).write_config()
    with pytest.raises(AttnEditError, match="another comparison"):
        made_up(tiny_dims, tmp_path, "--stage2.lr", "1e-5").write_config()


def test_a_configuration_keeps_what_is_its_own(tmp_path: Path) -> None:
    material = *make_pair(tmp_path), write_text(tmp_path / "text.txt")
    path = write_config(tmp_path / "c.yaml", tmp_path / "unused", *material)
    config = make_config(
        path, ["--optim.micro_batch", "1"], target="", layers=None, devices=2, steps=9, tail=3,
        out=tmp_path / "out",
    )  # fmt: skip
    before = load_config(path)
    assert (config.teacher, config.student, config.data) == (
        before.teacher, before.student, before.data,
    )  # fmt: skip
    assert config.optim.tokens == 9 * before.optim.batch * before.data.sequence_length
    assert (config.checkpoint.every_steps, config.checkpoint.export) == (6, "none")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model and --config"),
        (["--model", "tiny", "--config", "c.yaml"], "--model and --config"),
        (["--model", "gpt"], "--model: gpt"),
        (["--model", "tiny", "--devices", "1"], "--devices: 1"),
        (["--model", "tiny", "--tail", "5"], "--tail: 5"),
        (["--model", "tiny", "--only", "two"], "--only: two"),
        (["--model", "tiny", "--optim.batch", "3"], "optim.batch: 3"),
        (["--model", "tiny", "--optim.bath", "4"], "optim.bath"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input(tiny_dims: str, tmp_path: Path, arguments: list[str], said: str) -> None:
    common = ["--steps", "8", "--out", str(tmp_path / "out"), "--devices", "2"]
    command = ["training-scaling", *common, *arguments, *CPU, "--data.sequence_length", "32"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, AttnEditError)
    assert said in str(done.exception)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_failed_run_leaves_what_there_is(
    tiny_dims: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Its log is named, and the result of the runs before it is written."""
    scaling = made_up(tiny_dims, tmp_path)
    write_run(scaling, "one", dict.fromkeys(range(1, 7), 0.5), 2.0)

    def fail(*_: Any) -> None:
        raise runs.CommandFailed(["train"], 1, None)

    monkeypatch.setattr(runs, "_run_part", fail)
    options = [*SIZES, "--optim.batch", "2", *CPU]
    with pytest.raises(runs.CommandFailed):
        compare(
            source_of(tiny_dims, None), options, target="gateswa", layers=None, devices=2, steps=6,
            tail=2, tolerance=1e-3, out=tmp_path, result=tmp_path / "r.json", budget_s=None,
        )  # fmt: skip
    document = json.loads((tmp_path / "r.json").read_text())
    assert not document["complete"]
    assert [row["metric"] for row in document["rows"]] == ["tokens per second"]
    assert {"machine", "versions", "commit", "command", "date"} <= set(document["provenance"])


def test_making_up_the_model_counts_in_the_budget(
    tiny_dims: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[float] = []

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return make_config(*args, **options)

    def note(_scaling: Scaling, budget_s: float, _only: Any) -> bool:
        left.append(budget_s)
        return False

    monkeypatch.setattr(scaling_command, "make_config", slow)
    monkeypatch.setattr(scaling_command, "run_all", note)
    compare(
        tiny_dims, [*SIZES, "--optim.batch", "2", *CPU], target="gateswa", layers=None, devices=2,
        steps=6, tail=2, tolerance=1e-3, out=tmp_path, result=tmp_path / "r.json", budget_s=100.0,
    )  # fmt: skip
    assert 50 < left[0] <= 99.7
