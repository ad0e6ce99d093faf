"""Runs cases one after the other and prints what it measures, a JSON object a line.

A process of its own, because a kernel that faults takes its process along:
:mod:`benchmarks.kernels.__main__` then starts another one without the contestant that did it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics

import torch
from torch import Tensor

from benchmarks.kernels import latent_cases, window_cases, write_cases
from benchmarks.kernels.ceilings import copy_bandwidth, matmul_rate, read_floor_us
from benchmarks.kernels.contest import OURS, Case, Contest
from benchmarks.kernels.timing import Replay, compare

CASES: list[Case] = [*window_cases.CASES, *latent_cases.CASES, *write_cases.CASES]

#: Largest relative L2 difference between a control's output and ours, both in bfloat16.
AGREEMENT = 2e-2
#: Operators whose traffic is nearly all reads.
READING = ("gateswa_decode", "mla_decode")


def say(event: str, **fields: object) -> None:
    """One line for the parent process."""
    print(json.dumps({"event": event, **fields}), flush=True)


def disagreement(contest: Contest, name: str) -> str | None:
    """Why the contestant's output cannot be compared, or None."""
    ours, theirs = contest.calls[OURS][0](), contest.calls[name][0]()
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        return "no output to compare"
    difference = (theirs.float() - ours.float()).norm() / ours.float().norm()
    if not float(difference) < AGREEMENT:
        return f"its output differs by {float(difference):.3g}"
    return None


def run(case: Case, skip: set[str], rounds: int, per_round: int) -> None:
    """Measure one case; contestants named in ``skip`` are left out."""
    say("start", case=case.name, contestant=OURS)
    torch.manual_seed(0)
    contest = case.build()
    say("case", case=case.name, traffic=contest.traffic, operations=contest.operations)
    for name, why in contest.notes.items():
        say("note", case=case.name, contestant=name, note=why)
    replays: dict[str, Replay] = {}
    expected_us = contest.traffic / 4e6
    for name, calls in contest.calls.items():
        if f"{case.name}::{name}" in skip:
            continue
        say("start", case=case.name, contestant=name)
        if note := disagreement(contest, name):
            say("note", case=case.name, contestant=name, note=note)
            continue
        replays[name] = Replay(calls, expected_us)
    for name, times in compare(replays, rounds, per_round).items():
        quartiles = statistics.quantiles(times, n=4)
        say(
            "time",
            case=case.name,
            contestant=name,
            us=statistics.median(times),
            spread=(quartiles[2] - quartiles[0]) / quartiles[1],
        )
    if case.operator in READING:
        contest.calls.clear()
        replays.clear()
        torch.cuda.empty_cache()
        say("floor", case=case.name, us=read_floor_us(contest.traffic))
    say("done", case=case.name)


def main() -> None:
    """The worker's entry point; called by the benchmark, not by people."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", required=True, help="JSON list of names")
    parser.add_argument("--skip", required=True, help="JSON list of case::contestant")
    parser.add_argument("--ceilings", action="store_true")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--per-round", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.ceilings:
        say("ceilings", copy_gbps=copy_bandwidth(), matmul_tflops=matmul_rate())
        torch.cuda.empty_cache()
    by_name = {case.name: case for case in CASES}
    skip = set(json.loads(arguments.skip))
    for name in json.loads(arguments.cases):
        run(by_name[name], skip, arguments.rounds, arguments.per_round)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
