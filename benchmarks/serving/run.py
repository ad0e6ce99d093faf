"""The whole benchmark: every system in turn, the control once more at the end, one report.

Each level's result is a file of its own in the output folder. A run that was interrupted, ran out
of its budget or was told to do a part only is carried on by the next one with the same folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks.names import check_known
from benchmarks.provenance import provenance
from benchmarks.serving.crosscheck import crosscheck
from benchmarks.serving.options import Options
from benchmarks.serving.plan import Plan
from benchmarks.serving.readiness import warm_up
from benchmarks.serving.repeats import run_repeats
from benchmarks.serving.reported import kv_report
from benchmarks.serving.server import (
    Running,
    ServerFailed,
    check_arguments,
    environment_of,
    serving,
)
from benchmarks.serving.spread import spread_of
from benchmarks.serving.system import System
from benchmarks.serving.systems import check_spread, describe, is_dummy, prepare
from benchmarks.serving.workload import Workload
from vllm_attnedit.errors import AttnEditError


@dataclass(frozen=True)
class Pass:
    """One start of one system's server. The control's second pass is number 2."""

    system: System
    number: int = 1

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.system.name if self.number == 1 else f"{self.system.name}.again"


def passes(options: Options) -> list[Pass]:
    """A-B-A: the control first and last, everything else between."""
    order = [Pass(system) for system in options.systems]
    if options.repeat_control and len(order) > 1:
        order.append(Pass(options.systems[0], 2))
    return order


class Benchmark:
    """A benchmark and its output folder.

    Args:
        options: what is measured.
        out: folder; if it holds results, they must be of the same options.
        systems, workloads: names to do now; all by default.
        budget_s: no level is begun later than so many seconds after the start.

    Raises:
        AttnEditError: for names that are not there, or a folder of another benchmark.
    """

    def __init__(
        self,
        options: Options,
        out: Path,
        systems: list[str] | None = None,
        workloads: list[str] | None = None,
        budget_s: float | None = None,
    ) -> None:
        self.options, self.out = options, out
        self.deadline = None if budget_s is None else time.monotonic() + budget_s
        self.systems = _names("--system", systems, [s.name for s in options.systems])
        self.workloads = _names("--workload", workloads, [w.name for w in options.workloads])
        for system in options.systems:
            check_arguments(system, options.server)
        out.mkdir(parents=True, exist_ok=True)
        _keep_options(options, out)
        self.provenance = provenance(apart=True)

    def run(self) -> None:
        """Measure what is not there yet."""
        for one in passes(self.options):
            if one.system.name in self.systems and self._has_time():
                self._run_pass(one)

    def levels(self, one: Pass) -> Iterator[tuple[Workload, float, Path]]:
        """A pass's levels and their files, in order."""
        again = self.options.repeat_control
        for workload in self.options.workloads:
            if one.number == 2 and not isinstance(again, bool) and workload.name not in again:
                continue
            if workload.systems is None or one.system.name in workload.systems:
                for level in workload.levels:
                    name = f"{workload.name}-{level:g}.json"
                    yield workload, level, self.out / "levels" / one.name / name

    def _has_time(self) -> bool:
        return self.deadline is None or time.monotonic() < self.deadline

    def _run_pass(self, one: Pass) -> None:
        todo = [
            entry
            for entry in self.levels(one)
            if entry[0].name in self.workloads and not entry[2].exists()
        ]
        if not todo:
            return
        folder = prepare(self.options, one.system, self.out / "models")
        check_spread(folder, one.system, self.options.server)
        model = describe(folder, one.system.name, self.options.server.max_model_len)
        for workload, _, _ in todo:
            Plan(workload, model["vocab_size"], model["max_model_len"])  # refuses before it starts
        starts = 0
        while todo and self._has_time():
            starts += 1
            log = self.out / "logs" / f"{one.name}-{int(time.time())}.log"
            server = self.options.server
            if is_dummy(self.options):
                server = server.model_copy(
                    update={"arguments": ("--load-format", "dummy", *server.arguments)}
                )
            try:
                _say(f"{one.name}: starting the server ({log})")
                with serving(one.system, server, folder, model["name"], log) as running:
                    self._note_server(one, running, folder)
                    todo = self._measure(one, running, model, todo)
            except ServerFailed as failure:
                # Up and dead again is a level's affair; never up is that of all that were to come.
                _say(f"{one.name}: {failure}")
                status = "out of memory" if failure.out_of_memory else "failed"
                for workload, level, path in todo:
                    _write(path, _no_figures(one, workload, level, status, str(failure)))
                return

    def _measure(
        self,
        one: Pass,
        running: Running,
        model: dict[str, Any],
        todo: list[tuple[Workload, float, Path]],
    ) -> list[tuple[Workload, float, Path]]:
        """Levels until all are done or the server is dead; returns those left."""
        options = self.options
        while todo and running.alive and self._has_time():
            workload, level, path = todo[0]
            _say(f"{one.name}: {workload.name} at {level:g}")
            warm_up(running, workload, model, options.measure.warm_up_requests)
            folder = path.with_suffix("")
            result = run_repeats(running, workload, level, model, options, folder)
            _write(path, {**_identity(one, workload), **result, "provenance": self.provenance})
            _say(f"{one.name}: {workload.name} at {level:g}: {_short(result)}")
            todo = todo[1:]
            wanted = options.measure.crosscheck == f"{workload.name}:{level:g}"
            target = self.out / "crosscheck.json"
            if wanted and one.number == 1 and running.alive and not target.exists():
                _say(f"{one.name}: the same with vllm bench serve")
                folder = self.out / "crosscheck"
                check = crosscheck(running, workload, level, model, options, folder)
                _write(target, {"system": one.system.name, **check})
        return todo

    def _note_server(self, one: Pass, running: Running, folder: Path) -> None:
        """What is needed to repeat it, and what it said about its cache."""
        spread = spread_of(one.system, self.options.server)
        _write(
            self.out / "servers" / f"{one.name}.json",
            {
                "system": one.system.name,
                "command": running.command,
                "environment": environment_of(self.options.server),
                "model": str(folder),
                "tensor_parallel": spread.tensor,
                "data_parallel": spread.data,
                **kv_report(running.log.read_text(errors="replace")),
                "provenance": self.provenance,
            },
        )


def _identity(one: Pass, workload: Workload) -> dict[str, Any]:
    return {"system": one.system.name, "pass": one.number, "workload": workload.name}


def _no_figures(
    one: Pass, workload: Workload, level: float, status: str, reason: str
) -> dict[str, Any]:
    return {**_identity(one, workload), "level": level, "status": status, "reason": reason}


def _short(result: dict[str, Any]) -> str:
    if "figures" not in result:
        return f"{result['status']}: {result['reason'][:200]}"
    figures = result["figures"]
    rate, ttft = figures["output_tokens_per_s"]["value"], figures["ttft_s"]["p50"]
    first = "unknown" if ttft is None else f"{ttft:.3f} s"
    return f"{result['status']}, {rate:,.1f} output tok/s, median TTFT {first}"


def _keep_options(options: Options, out: Path) -> None:
    """Note what the folder's results are of; refuse those of another benchmark."""
    stored = out / "options.json"
    if stored.exists():
        try:
            same = Options.model_validate_json(stored.read_text()) == options
        except ValidationError:
            same = False
        if not same:
            raise AttnEditError("--out", out, "it holds another benchmark: give a new folder")
    stored.write_text(json.dumps(options.model_dump(mode="json"), indent=1))


def _names(option: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    check_known(option, wanted or (), known)
    return wanted or known


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1))
    part.rename(path)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
