"""A suite's jobs: order, devices, budgets, failures; and the suites that are kept here."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from benchmarks.__main__ import app
from benchmarks.serving.options import load_options
from benchmarks.serving.run import Benchmark
from benchmarks.suite.options import Suite, load_suite
from benchmarks.suite.runner import Runner
from examples.quickstart import processes
from vllm_attnedit.errors import AttnEditError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "benchmarks/suite/configs").glob("*.yaml"))
PYTHON = shlex.quote(sys.executable)
# Notes when it ran, where, and with which words.
NOTE = (
    "import json, os, pathlib, sys, time; began = time.time(); time.sleep({sleep}); "
    "note = dict(began=began, ended=time.time(), devices=os.environ['CUDA_VISIBLE_DEVICES'], "
    "cores=sorted(os.sched_getaffinity(0)), words=sys.argv[2:]); "
    "pathlib.Path(sys.argv[1]).open('a').write(json.dumps(note) + chr(10))"
)


def note(name: str, sleep: float = 0.3, *words: str) -> str:
    code = NOTE.format(sleep=sleep)
    return f"{PYTHON} -c {shlex.quote(code)} {{out}}/{name}.notes {' '.join(words)}"


def job(name: str, command: str | None = None, **options: Any) -> dict[str, Any]:
    return {"name": name, "command": command or note(name), "seconds": 1, **options}


def run(
    out: Path, jobs: Sequence[dict[str, Any]], devices: str = "0,1", **options: Any
) -> dict[str, dict[str, Any]]:
    suite = Suite.model_validate({"jobs": jobs})
    runner = Runner(suite, out, devices.split(","), options.pop("budget", None), print)
    runner.run(**options)
    stored: dict[str, Any] = json.loads((out / "suite.json").read_text())
    assert stored["jobs"] == runner.states
    assert set(stored["provenance"]) >= {"machine", "versions", "commit", "command"}
    return runner.states


def notes(out: Path, name: str) -> list[dict[str, Any]]:
    path = out / f"{name}.notes"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_jobs_share_devices_in_the_order_of_the_list(tmp_path: Path) -> None:
    jobs = [job("long", note("long", 1.5)), job("first"), job("both", devices="all"), job("last")]
    states = run(tmp_path, jobs)
    assert [entry["state"] for entry in states.values()] == ["done"] * 4
    (long,), (first,) = notes(tmp_path, "long"), notes(tmp_path, "first")
    (both,), (last,) = notes(tmp_path, "both"), notes(tmp_path, "last")
    assert (long["devices"], first["devices"], both["devices"]) == ("0", "1", "0,1")
    assert first["began"] < long["ended"]
    # Device 1 was free for `last` all the while: it does not overtake what needs both.
    assert first["ended"] < long["ended"] <= both["began"]
    assert both["ended"] <= last["began"]


def test_each_device_has_its_cores(tmp_path: Path) -> None:
    run(tmp_path, [job("a"), job("b"), job("both", devices=2)])
    (a,), (b,), (both,) = (notes(tmp_path, name) for name in ("a", "b", "both"))
    if len(both["cores"]) == 1:
        pytest.skip("one core cannot be shared out")
    assert not set(a["cores"]) & set(b["cores"])
    assert sorted(a["cores"] + b["cores"]) == both["cores"]


def test_more_devices_than_cores(tmp_path: Path) -> None:
    run(tmp_path, [job("a")], devices=",".join(map(str, range(1000))))
    (a,) = notes(tmp_path, "a")
    assert a["cores"]


def test_what_does_not_fit_is_left_and_what_is_done_stays_done(tmp_path: Path) -> None:
    resumable = note("again", 0, "{budget}")
    jobs = [job("long", seconds=100), job("short"), job("again", resumable, seconds=99, least=1)]
    states = run(tmp_path, jobs, budget=55)
    assert {name: entry["state"] for name, entry in states.items()} == {
        "long": "left", "short": "done", "again": "done",
    }  # fmt: skip
    assert not notes(tmp_path, "long")
    (again,) = notes(tmp_path, "again")
    assert 20 < int(again["words"][0]) <= 25  # some of the 55 is kept for the end

    states = run(tmp_path, jobs)
    assert all(entry["state"] == "done" for entry in states.values())
    assert [len(notes(tmp_path, name)) for name in ("long", "short", "again")] == [1, 1, 2]
    assert int(notes(tmp_path, "again")[1]["words"][0]) == 990  # a number, without any limit too


def test_what_hangs_is_stopped_alone(tmp_path: Path) -> None:
    jobs = [job("hangs", note("hangs", 60), limit=1), job("works", note("works", 3)), job("next")]
    began = time.monotonic()
    states = run(tmp_path, jobs)
    assert time.monotonic() - began < 15
    assert {name: entry["state"] for name, entry in states.items()} == {
        "hangs": "stopped", "works": "done", "next": "done",
    }  # fmt: skip
    assert not notes(tmp_path, "hangs")


def test_what_runs_over_is_stopped(tmp_path: Path) -> None:
    began = time.monotonic()
    states = run(tmp_path, [job("over", note("over", 60)), job("next")], "0", budget=32)
    assert time.monotonic() - began < 10
    assert states["over"]["state"] == "stopped"
    assert states["next"]["state"] == "left"
    assert not notes(tmp_path, "over")


def test_what_is_stopped_has_time_to_end_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server in a process group of its own, which its group's end would leave behind."""
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.2)
    code = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(1); pathlib.Path(sys.argv[1]).touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end); time.sleep(60)"
    )
    names = ("a", "b")
    jobs = [job(name, f"{PYTHON} -c {shlex.quote(code)} {{out}}/{name}.ended") for name in names]
    states = run(tmp_path, jobs, budget=32)
    assert [states[name]["state"] for name in names] == ["stopped"] * 2
    assert all((tmp_path / f"{name}.ended").exists() for name in names)


def test_a_failure_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    bad = f"{PYTHON} -c 'raise ValueError(\"what is wrong\")'"
    jobs = [job("bad", bad), job("nowhere", "no-such-program --option"), job("good")]
    for _ in range(2):  # what failed is tried again
        states = run(tmp_path, jobs)
        assert states["bad"]["state"] == states["nowhere"]["state"] == "failed"
        assert "what is wrong" in states["bad"]["reason"]
        assert "no-such-program" in states["nowhere"]["reason"]
        assert states["good"]["state"] == "done"
        assert len(notes(tmp_path, "good")) == 1


def test_only_some(tmp_path: Path) -> None:
    states = run(tmp_path, [job("a"), job("b")], only=["b"])
    assert set(states) == {"b"}


def command(file: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", "suite", str(file), *options]


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(99)"
    begin = f"{PYTHON} -c {shlex.quote(code)} {{out}}/began"
    file.write_text(yaml.safe_dump({"jobs": [job("long", begin)]}))
    out = tmp_path / "out"
    options = ["--out", str(out), "--devices", "0"]
    with subprocess.Popen(command(file, *options), cwd=ROOT) as process:
        deadline = time.monotonic() + 30
        while not (out / "began").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 128 + signal.SIGINT
    assert json.loads((out / "suite.json").read_text())["jobs"]["long"]["state"] == "stopped"
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(out / "began") not in listing.stdout


@pytest.mark.parametrize(
    ("jobs", "options", "told"),
    [
        ([job("a")], ["--only", "b"], "--only: b: use one of a"),
        ([job("a")], ["--devices", "0,0"], "--devices: 0,0"),
        ([job("a"), job("a")], [], "a name of its own"),
        ([job("a", devices=3)], [], "jobs.a.devices: 3: there are 2"),
        ([job("a", devices=0)], [], "jobs.0.devices"),
        ([job("a", "it's")], [], "command: No closing quotation"),
        ([job("a", " ")], [], "command: give one"),
        ([job("a", least=1)], [], "least: is for a command that takes {budget}"),
        ([job("a", wanted=1)], [], "jobs.0.wanted"),
        ([], [], "jobs"),
        (None, [], "give a suite's YAML file"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, jobs: list[dict[str, Any]] | None, options: list[str], told: str
) -> None:
    file = tmp_path / "suite.yaml"
    if jobs is not None:
        file.write_text(yaml.safe_dump({"jobs": jobs}))
    if "--devices" not in options:
        options = ["--devices", "0,1", *options]
    done = subprocess.run(
        command(file, "--out", str(tmp_path / "out"), *options),
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert told in line
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_commands_of_suites_are_understood(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in load_suite(path).jobs:
        program, _, module, *words = one.words(Path("out"), 100)
        assert program == sys.executable
        for word in words:
            if word.startswith(("benchmarks/", "tests/")):
                assert (ROOT / word).exists(), word
        if module == "benchmarks":
            name, *arguments = words
            commands = get_command(app)
            assert isinstance(commands, TyperGroup)
            asked = commands.commands[name].make_context(name, arguments).params
            if name == "serving":
                options = load_options(ROOT / asked["config"], 2)
                Benchmark(options, tmp_path / one.name, asked["system"], asked["workload"])
        elif module.startswith("benchmarks."):
            monkeypatch.setattr(sys, "argv", ["", *words])
            assert import_module(module).parse()
        else:
            assert module == "pytest"


def test_there_are_suites() -> None:
    assert CONFIGS


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text("jobs: [")
    with pytest.raises(AttnEditError, match="mend the YAML"):
        load_suite(file)
