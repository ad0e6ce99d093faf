"""The four training runs, each a process or several, each carried on where it was left.

``one`` and ``several`` train from the start, on one device and sharded over all. ``one-to-several``
and ``several-to-one`` take the last steps anew, from a checkpoint that the other number of devices
wrote.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from benchmarks.names import check_known
from benchmarks.provenance import ROOT
from examples.quickstart.processes import CommandFailed, free_port, run
from training.config import Config
from training.progress import SPEED
from training.resuming import STATE
from vllm_attnedit.errors import AttnEditError

__all__ = ["RUNS", "CommandFailed", "Run", "Scaling", "run_all"]

START_S, SAVE_S = 60.0, 30.0
"""Set aside of a budget: for a run to load its models, and to save what it has."""


@dataclass(frozen=True)
class Run:
    """One of the runs.

    Attributes:
        name: of its folder.
        several: whether on all devices.
        origin: the run whose checkpoint it starts from; ``None`` starts from the untrained edit.
    """

    name: str
    several: bool
    origin: str | None = None


RUNS = (
    Run("one", False),
    Run("several", True),
    Run("one-to-several", True, "one"),
    Run("several-to-one", False, "several"),
)


@dataclass(frozen=True)
class Scaling:
    """A comparison and its folder.

    Attributes:
        config: of all runs; what differs between them is set by :meth:`command`.
        devices: of the sharded runs.
        steps: of a whole run.
        tail: steps that are taken anew from the other's checkpoint.
        out: the folder.
    """

    config: Config
    devices: int
    steps: int
    tail: int
    out: Path

    def __post_init__(self) -> None:
        if self.devices < 2:
            raise AttnEditError("--devices", self.devices, "give 2 or more to compare with one")
        if not 0 < self.tail <= self.steps // 2:
            fix = f"give 1 to {self.steps // 2}, half of the steps"
            raise AttnEditError("--tail", self.tail, fix)
        group = self.config.optim.micro_batch * self.devices
        if self.config.optim.batch % group:
            fix = f"give a multiple of {group}: micro_batch x devices"
            raise AttnEditError("optim.batch", self.config.optim.batch, fix)

    @property
    def shared(self) -> int:
        """The step after which checkpoints are exchanged."""
        return self.steps - self.tail

    def folder(self, name: str) -> Path:
        return self.out / "runs" / name

    def checkpoint(self, name: str, step: int) -> Path:
        return self.folder(name) / "checkpoints" / f"step-{step:08d}"

    def finished(self, name: str) -> bool:
        return (self.checkpoint(name, self.steps) / STATE).is_file()

    def write_config(self) -> Path:
        """The configuration of all runs, as a file that a person can use.

        Raises:
            AttnEditError: if the folder holds runs of another one.
        """
        path = self.out / "config.yaml"
        text = yaml.safe_dump(asdict(self.config), sort_keys=False)
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise AttnEditError("--out", self.out, "it holds another comparison: give a new folder")
        self.out.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def command(self, one: Run, minutes: float | None = None) -> list[str]:
        """The command line of a run, which stops in time if ``minutes`` are given."""
        start = ["-m", "training"]
        if one.several:
            start = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node"]
            start += [str(self.devices), "--master-addr", "127.0.0.1"]
            start += ["--master-port", str(free_port()), "-m", "training"]
        command = [sys.executable, *start, "stage2", str(self.out / "config.yaml")]
        command += ["--output", str(self.folder(one.name))]
        command += ["--run.sharding", "fsdp2" if one.several else "none"]
        if one.origin is not None:
            command += ["--checkpoint.resume", str(self.checkpoint(one.origin, self.shared))]
        return command if minutes is None else [*command, "--run.minutes", f"{minutes:.2f}"]


def run_all(scaling: Scaling, budget_s: float | None = None, only: Collection[str] = ()) -> bool:
    """Do what is left of all runs; returns whether nothing is.

    Args:
        scaling: the comparison.
        budget_s: stop and save in time for this many seconds from now.
        only: names of the runs to do now; empty for all.

    Raises:
        AttnEditError: for a name that is not there, or before the run whose checkpoint is needed.
        CommandFailed: if a run fails; its log is named.
    """
    names = [one.name for one in RUNS]
    check_known("--only", only, names)
    deadline = None if budget_s is None else time.monotonic() + budget_s
    scaling.write_config()
    for one in RUNS:
        if only and one.name not in only:
            continue
        if one.origin is not None and not scaling.finished(one.origin):
            fix = f"let {one.origin} end first, whose checkpoint it starts from"
            raise AttnEditError("--only", one.name, fix)
        while not scaling.finished(one.name):
            minutes = None
            if deadline is not None:
                left = deadline - time.monotonic() - START_S - SAVE_S
                if left <= 0:
                    return False
                minutes = left / 60
            _run_part(scaling, one, minutes)
    return all(scaling.finished(name) for name in names)


def _run_part(scaling: Scaling, one: Run, minutes: float | None) -> None:
    stamp = int(time.time())
    log = scaling.out / "logs" / f"{one.name}-{stamp}.log"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    print(f"[{time.strftime('%H:%M:%S')}] {one.name} ({log})", flush=True)
    run(scaling.command(one, minutes), log=log, env={"PYTHONPATH": path})
    # A later part would write its own over it.
    speed = scaling.folder(one.name) / SPEED
    if speed.is_file():
        shutil.move(speed, scaling.folder(one.name) / f"speed-{stamp}.json")
