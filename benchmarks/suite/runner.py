"""Begins a suite's jobs as devices come free, and notes how each went.

Jobs begin in the order of the file and none overtakes another, so that one that wants all devices
gets them. Beside its devices each has its share of the CPU cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.suite.options import Job, Suite
from examples.quickstart.processes import errors_or_end, process_group
from vllm_attnedit.errors import AttnEditError

_POLL_S = 0.5
_STOP_S = 30.0
"""Kept of a budget: to end what runs over, and to note it."""
_PATIENCE_S = 25.0
"""Of these, for a command that is asked to end: it may have a server to end, which nobody else
would."""
_ENOUGH = 10
"""Times its own time that a command may take where there is no limit."""


@dataclass
class _Running:
    job: Job
    process: Popen[bytes]
    devices: list[str]
    began: float
    group: ExitStack


class Runner:
    """The jobs of one call.

    Args:
        suite: what is to be done.
        out: folder of logs and of ``suite.json``, by which a job that is done is not done again.
        devices: names, as in ``CUDA_VISIBLE_DEVICES``.
        budget_s: seconds in which everything ends, if there is a limit.
        say: prints a line.

    Raises:
        AttnEditError: if a job wants more devices than there are.
    """

    def __init__(
        self,
        suite: Suite,
        out: Path,
        devices: Sequence[str],
        budget_s: float | None,
        say: Callable[[str], None],
    ) -> None:
        for job in suite.jobs:
            if job.devices != "all" and job.devices > len(devices):
                fix = f"there are {len(devices)} (--devices): give fewer, or more GPUs"
                raise AttnEditError(f"jobs.{job.name}.devices", job.devices, fix)
        self._suite, self._out, self._devices, self._say = suite, out, list(devices), say
        self._deadline = None if budget_s is None else time.monotonic() + budget_s - _STOP_S
        self._running: list[_Running] = []
        self._about = provenance(apart=True)
        self._ledger = out / "suite.json"
        self.states: dict[str, dict[str, Any]] = {}
        if self._ledger.exists():
            self.states = json.loads(self._ledger.read_text(encoding="utf-8"))["jobs"]
        out.mkdir(parents=True, exist_ok=True)

    def run(self, only: Sequence[str] = ()) -> None:
        """Do what is not done yet and fits.

        Args:
            only: names of jobs; empty for all.
        """
        waiting = [
            job for job in self._suite.jobs
            if (not only or job.name in only) and (job.resumable or self._state(job) != "done")
        ]  # fmt: skip
        try:
            while waiting or self._running:
                self._reap()
                while waiting and self._begin(waiting[0]):
                    del waiting[0]
                if self._running:
                    time.sleep(_POLL_S)
        finally:
            self._stop(self._running)

    def _state(self, job: Job) -> str:
        return str(self.states.get(job.name, {}).get("state", ""))

    def _left(self) -> float:
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    def _begin(self, job: Job) -> bool:
        """Begin a job or leave it out; ``False``: it waits for devices."""
        left = self._left()
        if job.needed > left:
            if not self._state(job):
                self._note(job, {"state": "left"})
            self._say(f"{job.name}: left for another time, it takes about {job.needed:.0f} s")
            return True
        taken = {device for one in self._running for device in one.devices}
        free = [device for device in self._devices if device not in taken]
        count = len(self._devices) if job.devices == "all" else job.devices
        if count > len(free):
            return False
        devices = free[:count]
        names = ",".join(devices)
        environment = {
            "CUDA_VISIBLE_DEVICES": names,
            "ASCEND_RT_VISIBLE_DEVICES": names,
            **job.environment,
        }
        command = job.words(self._out, min(left, _ENOUGH * job.seconds))
        log, group = self._log(job), ExitStack()
        try:
            with _on_cores(self._cores(devices)):
                process = group.enter_context(process_group(command, log=log, env=environment))
        except OSError as error:
            self._fail(job, {}, str(error))
            return True
        self._running.append(_Running(job, process, devices, time.monotonic(), group))
        self._say(f"{job.name}: begins on {names} ({log})")
        return True

    def _cores(self, devices: Sequence[str]) -> set[int]:
        """Cores in proportion to devices; all of them where there are fewer than devices."""
        cores = sorted(os.sched_getaffinity(0))
        each = len(cores) // len(self._devices)
        first = [self._devices.index(device) * each for device in devices]
        return {core for at in first for core in cores[at : at + each]} or set(cores)

    def _reap(self) -> None:
        """Note the jobs that ended, and end the others when time is up."""
        for one in list(self._running):
            status = one.process.poll()
            if status is not None:
                self._end(one, "failed" if status else "done")
        now = time.monotonic()
        self._stop(
            [one for one in self._running if now - one.began > (one.job.limit or float("inf"))]
        )
        if self._left() < 0:
            self._stop(self._running)

    def _stop(self, these: Sequence[_Running]) -> None:
        """End jobs, all at once: each by itself as long as it is given, then its group."""
        for one in these:
            one.process.terminate()
        deadline = time.monotonic() + _PATIENCE_S
        for one in list(these):
            with contextlib.suppress(TimeoutExpired):
                one.process.wait(max(0.0, deadline - time.monotonic()))
            self._end(one, "stopped")

    def _end(self, one: _Running, state: str) -> None:
        one.group.close()
        self._running.remove(one)
        seconds = time.monotonic() - one.began
        entry = {"seconds": round(seconds, 1), "devices": one.devices}
        if state == "failed":
            self._fail(one.job, entry, errors_or_end(self._log(one.job), 5))
        else:
            self._note(one.job, {"state": state, **entry})
            self._say(f"{one.job.name}: {state} after {seconds:.0f} s")

    def _fail(self, job: Job, entry: dict[str, Any], reason: str) -> None:
        self._note(job, {"state": "failed", **entry, "reason": reason})
        self._say(f"{job.name}: FAILED, {reason.splitlines()[-1] if reason else 'without a word'}")

    def _log(self, job: Job) -> Path:
        return self._out / "logs" / f"{job.name}.log"

    def _note(self, job: Job, entry: dict[str, Any]) -> None:
        self.states[job.name] = entry
        document = {"provenance": self._about, "jobs": self.states}
        part = self._ledger.with_suffix(".part")
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        part.rename(self._ledger)


@contextlib.contextmanager
def _on_cores(cores: set[int]) -> Iterator[None]:
    """What is started in the block runs on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
