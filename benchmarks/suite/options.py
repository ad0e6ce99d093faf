"""What a suite is: the schema of its YAML file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from benchmarks.strict_model import StrictModel, validated
from benchmarks.yaml_file import read_yaml

Seconds = Annotated[float, Field(gt=0)]


class Job(StrictModel):
    """One command of a suite.

    Attributes:
        name: in tables; its log is ``<out>/logs/<name>.log``.
        command: a command line. ``{out}`` in it is the suite's folder. ``{budget}`` is the seconds
            that the command has, and says that it stops in time by itself and does what is left
            when it is called again: it always is.
        seconds: that it takes, about; it does not begin with less time left.
        least: of a command with ``{budget}``: seconds with which it begins, instead of ``seconds``.
        limit: seconds after which it is ended: without one, what hangs takes the budget of all.
        devices: that it has to itself.
        environment: further variables.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    command: str
    seconds: Seconds
    least: Seconds | None = None
    limit: Seconds | None = None
    devices: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    environment: dict[str, str] = {}

    @model_validator(mode="after")
    def _fits(self) -> Job:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise ValueError(f"command: {error}") from error
        if not words:
            raise ValueError("command: give one")
        if self.least is not None and not self.resumable:
            raise ValueError("least: is for a command that takes {budget}")
        return self

    @property
    def resumable(self) -> bool:
        return "{budget}" in self.command

    @property
    def needed(self) -> float:
        """Seconds without which it does not begin."""
        return self.least or self.seconds

    def words(self, out: Path, budget_s: float) -> list[str]:
        """Program and arguments; ``python`` is the one that runs this."""
        budget = f"{budget_s:.0f}"
        program, *arguments = [
            word.replace("{out}", str(out)).replace("{budget}", budget)
            for word in shlex.split(self.command)
        ]
        return [sys.executable if program == "python" else program, *arguments]


class Suite(StrictModel):
    """A suite's file: its jobs, in the order in which they begin."""

    jobs: Annotated[tuple[Job, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Suite:
        names = [job.name for job in self.jobs]
        if len(set(names)) < len(names):
            raise ValueError(f"jobs: give each a name of its own, not {', '.join(names)}")
        return self


def load_suite(path: Path) -> Suite:
    """Read a suite's YAML file.

    Raises:
        AttnEditError: naming the file, the field and what is wrong with it.
    """
    return validated(Suite, read_yaml(path, "a suite's YAML file"), path)
