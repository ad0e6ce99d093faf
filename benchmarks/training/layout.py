"""What of an experiment lies where, and who works on what.

``out`` holds what is worth carrying away: the report, what it is made of, and packed edits.
Next to it (by default in it), ``work`` holds what is large: edits, checkpoints, logs. With ``out``
alone an experiment goes on elsewhere; runs under way begin anew or from a packed state.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from training.export import MODEL_FOLDER


@dataclass(frozen=True)
class Layout:
    """Paths of an experiment.

    Attributes:
        out: what is carried away.
        work: what stays.
    """

    out: Path
    work: Path

    @property
    def choice(self) -> Path:
        """The full layers that calibration chose."""
        return self.out / "choice.json"

    @property
    def durations(self) -> Path:
        """Seconds that kinds of tasks were seen to take."""
        return self.out / "durations.json"

    def result(self, run: str) -> Path:
        """What a run came to."""
        return self.out / "results" / f"{run}.json"

    def packed(self, run: str, what: str) -> Path:
        """A packed edit by the stage that made it, or the packed ``state`` of a stopped run."""
        return self.out / "packed" / run / what

    def measured(self, name: str, part: str) -> Path:
        """A part of the evaluation of a model."""
        return self.out / "evaluation" / name / f"{part}.json"

    def failure(self, task: str) -> Path:
        """Why a task failed."""
        return self.out / "failed" / f"{task}.json"

    def edit(self, slug: str) -> Path:
        """An untrained edit."""
        return self.work / "edits" / slug

    def stage(self, run: str, stage: str) -> Path:
        """Output of a stage."""
        return self.work / "runs" / run / stage

    def model(self, run: str, stage: str) -> Path:
        """The model that a stage made."""
        return self.stage(run, stage) / MODEL_FOLDER

    def job(self, name: str) -> Path:
        """The file that tells a process what to do."""
        path = self.work / "jobs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, task: str, stamp: int) -> Path:
        """What the process of a task wrote."""
        return self.work / "logs" / f"{task}-{stamp}.log"

    @contextmanager
    def lock(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether nobody else holds a name; it is held until the block, or this process, ends."""
        path = self.work / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
