"""What a suite is: the schema of its YAML file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_attnedit.errors import AttnEditError

Seconds = Annotated[float, Field(gt=0)]


class Job(BaseModel):
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

    model_config = ConfigDict(extra="forbid", frozen=True)

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


class Suite(BaseModel):
    """A suite's file: its jobs, in the order in which they begin."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    try:
        return Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise AttnEditError(str(path), error.strerror, "give a suite's YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AttnEditError(str(path), error, "mend the YAML") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        shown = first["input"] if not isinstance(first["input"], dict) else "..."
        raise AttnEditError(f"{path}: {field}", shown, first["msg"]) from error
