"""Does tasks one after the other within a budget; several runners share an experiment by locks."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT
from benchmarks.training.layout import Layout
from benchmarks.training.options import Seconds
from benchmarks.training.task import Task
from examples.quickstart.processes import errors_or_end, process_group
from training.files import read_json, write_json
from vllm_attnedit.errors import AttnEditError

POLL_S = 1.0
"""Between two looks at what other runners hold."""
_MARGIN = 1.15
"""Of times that were seen, over which the next one may go."""


def run_child(
    command: Sequence[str], log: Path, env: dict[str, str], stop_at: float | None, save_s: float
) -> tuple[int, bool]:
    """Run a command to its end, or ask it to end at ``stop_at`` and wait for it to save.

    Args:
        command: program and arguments.
        log: its output.
        env: variables on top of this program's.
        stop_at: in time of ``time.monotonic``; ``None``: never.
        save_s: seconds that it then has.

    Returns:
        its status, and whether it was asked to end.
    """
    asked = False
    with process_group(command, log=log, env=env) as process:
        try:
            try:
                left = None if stop_at is None else max(0.0, stop_at - time.monotonic())
                return process.wait(left), False
            except subprocess.TimeoutExpired:
                asked = True
        finally:
            # Also when this program itself is told to end: a stage saves what it has.
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(save_s)
                except subprocess.TimeoutExpired:
                    process.kill()
    return process.returncode, asked


class Runner:
    """One worker on an experiment's tasks.

    Args:
        missing: what is still to be done, in order, asked again after every task.
        layout: of the experiment.
        seconds: set aside of a budget.
        deadline: by which everything must have ended, in time of ``time.monotonic``, if any.
        began: wall time since when failures count as this command's; older ones are tried again.
        env: variables of the tasks' processes.
        say: prints a line.
    """

    def __init__(
        self,
        missing: Callable[[], list[Task]],
        layout: Layout,
        seconds: Seconds,
        deadline: float | None,
        began: float,
        env: dict[str, str],
        say: Callable[[str], None],
    ) -> None:
        self._missing, self._layout, self._seconds = missing, layout, seconds
        self._deadline, self._began, self._say = deadline, began, say
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._env = {**env, "PYTHONPATH": path}
        self._tried: set[str] = set()

    def run(self) -> None:
        """Do what can be done."""
        while True:
            advanced = held = False
            for task in self._ready():
                with self._layout.lock(task.name) as mine:
                    if not mine:
                        held = True
                        continue
                    if not task.done():  # by somebody who held it a moment ago
                        self._attempt(task)
                    advanced = True
                    break
            if not advanced and not (held and self._left() > POLL_S):
                break
            if not advanced:
                time.sleep(POLL_S)
        for task in self._missing():
            if not self._fits(task) and task.name not in self._tried:
                need = f"takes about {self._needed(task):.0f} s"
                self._say(f"{task.name}: left for another time, it {need}")

    def _ready(self) -> list[Task]:
        """Tasks that nothing stands in the way of, as far as this runner knows."""
        missing = self._missing()
        names = {task.name for task in missing}
        return [
            task for task in missing
            if names.isdisjoint(task.needs) and task.name not in self._tried
            and not self._failed(task) and self._fits(task)
        ]  # fmt: skip

    def _left(self) -> float:
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    def _needed(self, task: Task) -> float:
        seconds = self._seconds
        if task.resumable:
            return seconds.start + self._saving(task)
        seen = self._durations().get(task.kind)
        default: float = getattr(seconds, task.kind)
        return default if seen is None else _MARGIN * seen

    def _saving(self, task: Task) -> float:
        return self._seconds.save + (self._seconds.pack if task.carry else 0.0)

    def _fits(self, task: Task) -> bool:
        return self._needed(task) <= self._left()

    def _failed(self, task: Task) -> bool:
        path = self._layout.failure(task.name)
        return path.is_file() and bool(read_json(path, "failure")["time"] >= self._began)

    def _attempt(self, task: Task) -> None:
        self._tried.add(task.name)
        log = self._layout.log(task.name, time.time_ns() // 1_000_000)
        self._say(f"{task.name}: {log}")
        stop_at = self._deadline
        if stop_at is not None:
            stop_at -= self._saving(task) if task.resumable else 0.0
        began = time.monotonic()
        try:
            status, asked = run_child(task.command(), log, self._env, stop_at, self._seconds.save)
            seconds = time.monotonic() - began
            if status == 0 or task.resumable:
                task.ended(log, seconds)
        except SystemExit:
            if task.resumable:
                task.ended(log, time.monotonic() - began)
            raise
        except AttnEditError as error:
            self._fail(task, 2, f"error: {error}")
            return
        if task.done():
            self._layout.failure(task.name).unlink(missing_ok=True)
            self._learn(task, seconds)
            self._say(f"{task.name}: done in {seconds:.0f} s")
        elif asked:
            # What was cut short takes longer than this: never begin it with as little time again.
            self._learn(task, 1.5 * seconds)
            self._say(f"{task.name}: stopped after {seconds:.0f} s, out of time")
            self._carry(task)
        elif status == 0 and task.resumable:
            self._say(f"{task.name}: somebody else stopped it; it can go on")
        else:
            self._fail(task, status, said_by(log))

    def _carry(self, task: Task) -> None:
        if task.carry is None or task.carried is None:
            return
        log = self._layout.log(f"{task.name}@carry", time.time_ns() // 1_000_000)
        status, _ = run_child(task.carry(), log, self._env, self._deadline, 0.0)
        if status == 0:
            task.carried()
            self._say(f"{task.name}: its state is packed")
        else:
            self._say(f"{task.name}: its state could not be packed, see {log}")

    def _fail(self, task: Task, status: int, text: str) -> None:
        path = self._layout.failure(task.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"task": task.name, "owner": task.owner, "status": status, "text": text}
        write_json(path, about | {"time": time.time()})
        self._say(f"{task.name}: FAILED, {text.splitlines()[-1] if text else status}")

    def _durations(self) -> dict[str, float]:
        path = self._layout.durations
        found: dict[str, float] = read_json(path, "durations") if path.is_file() else {}
        return found

    def _learn(self, task: Task, seconds: float) -> None:
        if task.resumable:
            return
        with self._layout.lock("durations", wait=True):
            known = self._durations()
            known[task.kind] = round(max(seconds, known.get(task.kind, 0.0)), 1)
            self._layout.durations.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._layout.durations, known)


def said_by(log: Path) -> str:
    """What a failed process said: its one line, or its exceptions, or its end."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    mine = [line for line in lines if line.startswith("error: ")]
    return mine[-1] if mine else errors_or_end(log) if lines else "no output"


def failures(layout: Layout) -> list[dict[str, Any]]:
    """All tasks that failed last time they were tried."""
    folder = layout.out / "failed"
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
