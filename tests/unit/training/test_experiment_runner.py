"""Budget, locks and failures, with commands of a moment in place of training."""

from __future__ import annotations

import json
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.training import command
from benchmarks.training.layout import Layout
from benchmarks.training.options import Seconds
from benchmarks.training.runner import Runner, failures
from benchmarks.training.task import Task

MARK = "from pathlib import Path; Path(r'{}').touch()"
STAGE = (
    "import signal, sys, time; from pathlib import Path\n"
    "signal.signal(signal.SIGTERM, lambda *_: (Path(r'{0}.saved').touch(), sys.exit(0)))\n"
    "Path(r'{0}.began').touch(); time.sleep(60)"
)


class World:
    """Tasks in a folder; each touches a file of its name."""

    def __init__(self, folder):
        self.layout, self.folder = Layout(folder / "out", folder / "work"), folder
        self.tasks, self.said, self.seconds = [], [], Seconds(start=1, save=5, edit=1, text=1)

    def add(self, name, code=None, *, needs=(), kind="edit", **more):
        path = self.folder / name
        command = [sys.executable, "-c", (code or MARK).format(path)]
        self.tasks.append(Task(name, kind, "run", needs, path.is_file, lambda: command, **more))

    def missing(self):
        return [task for task in self.tasks if not task.done()]

    def runner(self, budget=None, began=None):
        deadline = None if budget is None else time.monotonic() + budget
        began = time.time() if began is None else began
        return Runner(
            self.missing, self.layout, self.seconds, deadline, began, {}, self.said.append
        )

    def attempts(self, name):
        return [line for line in self.said if line.startswith(f"{name}: ") and ".log" in line]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_tasks_wait_for_what_they_need(world):
    world.add("second", needs=("first",))
    world.add("first")
    world.runner().run()
    assert world.missing() == []
    assert [line.split(":")[0] for line in world.said if "done" in line] == ["first", "second"]


def test_a_failure_is_noted_and_the_others_go_on(world):
    world.add("bad", "print('error: lr: 9: give less'); raise SystemExit(2)")
    world.add("child", needs=("bad",))
    world.add("good")
    began = time.time()
    world.runner(began=began).run()
    assert [task.name for task in world.missing()] == ["bad", "child"]
    (failure,) = failures(world.layout)
    assert failure["status"] == 2
    assert failure["text"] == "error: lr: 9: give less"
    # Another worker of the same command leaves it alone; the next command tries once more.
    world.runner(began=began).run()
    assert len(world.attempts("bad")) == 1
    del world.tasks[0]
    world.add("bad")
    world.runner().run()
    assert world.missing() == []
    assert failures(world.layout) == []


def test_what_left_no_result_has_failed(world):
    world.add("empty", "print('nothing')")
    world.runner().run()
    assert [one["task"] for one in failures(world.layout)] == ["empty"]


def test_a_stage_is_stopped_in_time_and_its_end_taken_in(world):
    ended, carried = [], []
    world.add(
        "stage", STAGE, kind="stage", ended=lambda log, seconds: ended.append(seconds),
        carry=lambda: [sys.executable, "-c", ""], carried=lambda: carried.append(True),
    )  # fmt: skip
    world.seconds = Seconds(start=1, save=3, pack=2, edit=30)
    world.add("late")
    began = time.monotonic()
    world.runner(budget=8).run()
    assert time.monotonic() - began < 8
    assert (world.folder / "stage.saved").is_file()
    assert 1.5 < ended[0] < 6
    assert carried == [True]
    assert failures(world.layout) == []
    # An edit that takes 30 s was never begun.
    assert world.attempts("late") == []
    assert any("late: left for another time" in line for line in world.said)


def test_nothing_begins_without_the_time_it_is_known_to_take(world):
    world.add("quick", "import time; time.sleep(1.2);" + MARK)
    world.runner().run()
    known = json.loads(world.layout.durations.read_text())
    assert known["edit"] >= 1.2
    world.add("other")
    world.runner(budget=1.3).run()
    assert world.attempts("other") == []
    world.runner(budget=5).run()
    assert world.missing() == []


def test_what_was_cut_short_counts_as_longer(world):
    world.seconds = Seconds(edit=0.1, save=1)
    world.add("slow", "import time; time.sleep(60)")
    world.runner(budget=1.0).run()
    assert failures(world.layout) == []
    assert json.loads(world.layout.durations.read_text())["edit"] >= 1.4
    world.runner(budget=1.0).run()
    assert len(world.attempts("slow")) == 1


def test_what_another_worker_has_just_done_is_not_done_again(world):
    world.add("task")
    (world.folder / "task").touch()
    stale = [world.tasks, []]
    world.missing = lambda: stale.pop(0) if stale else []
    world.runner().run()
    assert world.attempts("task") == []


def test_two_workers_share_the_tasks(world):
    for name in "abcd":
        world.add(name, "import time; time.sleep(0.4);" + MARK)
    world.add("last", needs=tuple("abcd"))
    began = time.time()
    workers = [threading.Thread(target=world.runner(began=began).run) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert world.missing() == []
    for name in ("a", "b", "c", "d", "last"):
        assert len(world.attempts(name)) == 1


@pytest.mark.parametrize(
    ("device", "set_by_user", "threads"), [("1", None, 8), ("1", "3", 3), (None, None, None)]
)
def test_workers_with_devices_share_the_cores(monkeypatch, device, set_by_user, threads):
    seen: list[dict[str, str]] = []

    class Runner:
        def __init__(self, *arguments):
            seen.append(arguments[5])

        def run(self):
            pass

    monkeypatch.setattr(command, "Runner", Runner)
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    plan: Any = SimpleNamespace(layout=None, experiment=SimpleNamespace(seconds=None))
    command._work(command.Call("e.yaml", "out", "work", device=device), plan, None)
    (added,) = seen
    found = added.get("OMP_NUM_THREADS", set_by_user)
    assert found == (None if threads is None else str(threads))
    assert added.get("CUDA_VISIBLE_DEVICES") == device


def test_calls_that_share_a_folder_tell_their_workers_apart(world):
    """Their workers read what to do seconds later."""
    calls = [
        command.Call("experiment.yaml", "out", "work", only=(name,), device="0")
        for name in ("one", "other")
    ]
    plan: Any = SimpleNamespace(layout=world.layout)
    files = [command._job(plan, call) for call in calls]
    told = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert [call["only"] for call in told] == [["one"], ["other"]]
