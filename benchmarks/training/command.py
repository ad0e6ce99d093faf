"""``python -m benchmarks training``: what is left of an experiment, then its report."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.training.layout import Layout
from benchmarks.training.loading import check_names, load_experiment
from benchmarks.training.plan import Plan
from benchmarks.training.report import write_report
from benchmarks.training.runner import Runner, failures
from examples.quickstart.processes import process_group, stop_on_signals
from vllm_attnedit.errors import AttnEditError

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
_THREADS = "OMP_NUM_THREADS"
_MOST_THREADS = 8
"""Of a task that has a device: what it does on the CPU (small decompositions, packing) gains
nothing from more, and workers that each take all cores are several times slower."""
_GRACE_S = 10.0
"""That a worker has beyond its stage's time to save."""


@dataclass(frozen=True)
class Call:
    """What was asked for.

    Attributes:
        path: of the experiment.
        out, work: its folders.
        overrides: ``--key value`` pairs for its ``options``.
        only: runs and baselines; empty for all.
        deadline: wall time by which tasks must have ended, if any.
        began: wall time of the command.
        device: that tasks see; ``None``: all.
    """

    path: str
    out: str
    work: str
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    deadline: float | None = None
    began: float = 0.0
    device: str | None = None

    @property
    def layout(self) -> Layout:
        return Layout(Path(self.out), Path(self.work))

    def plan(self) -> Plan:
        """The checked tasks."""
        plan = Plan(load_experiment(Path(self.path), self.overrides), self.layout)
        check_names("--only", self.only, plan.names())
        return plan


def run_experiment(
    path: Path,
    out: Path,
    *,
    work: Path | None = None,
    budget_s: float | None = None,
    only: Sequence[str] = (),
    devices: str | None = None,
    overrides: Sequence[str] = (),
    report_only: bool = False,
) -> dict[str, Any]:
    """Do what is left within the budget, and write the report of what there is.

    Args:
        path: the experiment's YAML file.
        out: folder of results.
        work: folder of edits, checkpoints and logs; ``out/work`` by default.
        budget_s: seconds until everything, the report included, must have ended.
        only: runs and baselines to work on now.
        devices: as of ``CUDA_VISIBLE_DEVICES``; one worker for each works on its own tasks.
        overrides: ``--key value`` pairs for the training options.
        report_only: train and measure nothing.

    Returns:
        ``complete``, the names of tasks ``left`` and ``failed``, and where the report is.

    Raises:
        AttnEditError: for bad input.
    """
    began, clock = time.time(), time.monotonic()
    call = Call(str(path), str(out), str(work or out / "work"), tuple(overrides), tuple(only))
    plan = call.plan()
    names = devices.split(",") if devices else []
    if not all(name.strip() for name in names):
        raise AttnEditError("--devices", devices, "give indices such as 0,1")
    stop_on_signals()
    try:
        if not report_only:
            if budget_s is not None:
                budget_s -= plan.experiment.seconds.report
            limits = {"began": began, "deadline": None if budget_s is None else began + budget_s}
            each: Sequence[str | None] = names or [None]
            calls = [Call(**{**asdict(call), **limits, "device": name}) for name in each]
            if len(calls) == 1:
                _work(calls[0], plan, None if budget_s is None else clock + budget_s)
            else:
                _share(calls, plan)
    finally:
        # Also when interrupted: what there is is reported.
        write_report(plan)
    left = [task.name for task in plan.missing(call.only)]
    failed = [str(one["task"]) for one in failures(plan.layout) if float(one["time"]) >= began]
    summary = {"complete": not left, "left": left, "failed": failed}
    return summary | {"report": str(out / "report.md")}


def _work(call: Call, plan: Plan, deadline: float | None) -> None:
    device = call.device
    mark = "" if device is None else f" [{device}]"
    env = {} if device is None else dict.fromkeys(_VISIBLE, device) | _threads()
    Runner(
        lambda: plan.missing(call.only),
        plan.layout,
        plan.experiment.seconds,
        deadline,
        call.began,
        env,
        lambda line: print(f"[{time.strftime('%H:%M:%S')}]{mark} {line}", flush=True),
    ).run()


def _threads() -> dict[str, str]:
    """Threads of a task, unless the user has set them."""
    if _THREADS in os.environ:
        return {}
    return {_THREADS: str(min(_MOST_THREADS, os.cpu_count() or 1))}


def _job(plan: Plan, call: Call) -> Path:
    """The file that tells a worker its call; other calls on the same folder have their own."""
    folder = plan.layout.job("worker").parent
    handle, name = tempfile.mkstemp(".json", "worker-", folder)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(asdict(call), file)
    return Path(name)


def _share(calls: Sequence[Call], plan: Plan) -> None:
    """A process for each device, all on the same experiment."""
    patience = plan.experiment.seconds.save + _GRACE_S
    with contextlib.ExitStack() as stack:
        workers = []
        for call in calls:
            job = _job(plan, call)
            command = [sys.executable, "-m", "benchmarks.training.command", str(job)]
            workers.append(stack.enter_context(process_group(command)))
        try:
            for worker in workers:
                worker.wait()
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                for worker in workers:
                    worker.wait(patience)


def main() -> None:
    """A worker: ``python -m benchmarks.training.command CALL.json``."""
    stop_on_signals()
    call = Call(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    left = None if call.deadline is None else time.monotonic() + call.deadline - time.time()
    _work(call, call.plan(), left)


if __name__ == "__main__":
    main()
