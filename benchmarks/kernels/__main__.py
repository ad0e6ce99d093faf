"""``python -m benchmarks.kernels``: every operator against what vLLM ships, on this GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.kernels.report import Measured, Result, rows, show
from benchmarks.provenance import provenance

ROUNDS, PER_ROUND = 5, 7
QUICK_ROUNDS, QUICK_PER_ROUND = 2, 3


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument(
        "--only", action="append", metavar="REGEX", help="cases whose name matches; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="one case an operator, few repeats")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    return parser.parse_args(argv)


def fail(field: str, value: object, fix: str) -> NoReturn:
    """One line for people, exit status 2."""
    print(f"error: {field}: {value}: {fix}", file=sys.stderr)
    raise SystemExit(2)


def measure(names: list[str], rounds: int, per_round: int) -> Result:
    """Run the cases in worker processes, starting another one where a contestant faults."""
    result = Result()
    left, skip = list(names), list[str]()
    while left:
        command = [
            *(sys.executable, "-m", "benchmarks.kernels.worker"),
            *("--cases", json.dumps(left), "--skip", json.dumps(skip)),
            *("--rounds", str(rounds), "--per-round", str(per_round)),
            *(() if result.copy_gbps else ("--ceilings",)),
        ]
        at: tuple[str, str] | None = None
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                if not line.startswith('{"event"'):
                    continue
                event = json.loads(line)
                if event["event"] == "start":
                    at = (event["case"], event["contestant"])
                elif event["event"] == "done":
                    left.remove(event["case"])
                    at = None
                record(result, event)
            status = worker.wait()
        if status == 0:
            break
        if at is None:
            fail("worker", f"status {status}", "read its message above")
        else:
            case, contestant = at
            note = f"ended its process (status {status})"
            print(f"{case}: {contestant} {note}; going on without it", file=sys.stderr)
            result.cases.setdefault(case, Measured(0, 0)).notes[contestant] = note
            if f"{case}::{contestant}" in skip or contestant == "ours":
                left.remove(case)
            skip.append(f"{case}::{contestant}")
    return result


def record(result: Result, event: dict[str, Any]) -> None:
    """Enter one of the worker's lines."""
    kind = event["event"]
    if kind == "ceilings":
        result.copy_gbps, result.matmul_tflops = event["copy_gbps"], event["matmul_tflops"]
    elif kind == "case":
        # A second worker reports the case anew; what was noted of it stays.
        before = result.cases.get(event["case"])
        result.cases[event["case"]] = Measured(
            event["traffic"], event["operations"], notes=before.notes if before else {}
        )
    elif kind == "note":
        result.cases[event["case"]].notes[event["contestant"]] = event["note"]
    elif kind == "floor":
        result.cases[event["case"]].floor_us = event["us"]
    elif kind == "time":
        result.cases[event["case"]].us[event["contestant"]] = event["us"]
        result.cases[event["case"]].spread[event["contestant"]] = event["spread"]


def main(argv: list[str] | None = None) -> None:
    """Choose cases, measure them, print the table and one JSON line."""
    arguments = parse(argv)
    from benchmarks.kernels.worker import CASES

    chosen = [case for case in CASES if case.quick or not arguments.quick]
    for pattern in arguments.only or []:
        try:
            re.compile(pattern)
        except re.error as error:
            fail("--only", pattern, f"pass a regular expression ({error})")
    if arguments.only:
        chosen = [c for c in chosen if any(re.search(p, c.name) for p in arguments.only)]
    if not chosen:
        fail("--only", arguments.only, "match at least one name of --list")
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return
    import torch

    if not torch.cuda.is_available():
        fail("device", "no CUDA GPU", "run this where torch.cuda.is_available()")
    if importlib.util.find_spec("triton") is None:
        fail("triton", "not installed", "install it beside torch")
    repeats = (QUICK_ROUNDS, QUICK_PER_ROUND) if arguments.quick else (ROUNDS, PER_ROUND)
    result = measure([case.name for case in chosen], *repeats)
    show(result)
    document = {"provenance": provenance(), "rows": rows(result)}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
