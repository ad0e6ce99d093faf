"""What a runner asks of a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def _nothing(_log: Path, _seconds: float) -> None:
    """Most tasks leave their result where it belongs."""


def _never() -> bool:
    """Of most tasks nothing is known but their result."""
    return False


@dataclass(frozen=True)
class Task:
    """One process: an edit, a stage, a measurement. So a failure is that task's alone.

    Attributes:
        name: of the task, its log and its lock.
        kind: whose times predict this one's; a ``stage`` can be stopped without losing anything.
        owner: the run or baseline it belongs to.
        needs: tasks that must be done before.
        done: whether its result is there.
        command: the command line; asked once the needs are done.
        ended: takes in what the process left: its log, and how many seconds it took.
        carry: of a stage: the command line that packs what a stopped run has so far.
        carried: takes in what that packed.
        noted: whether all that is told of it is known, though its result may be lost: done again
            only for a task that needs it.
    """

    name: str
    kind: str
    owner: str
    needs: tuple[str, ...]
    done: Callable[[], bool]
    command: Callable[[], list[str]]
    ended: Callable[[Path, float], None] = _nothing
    carry: Callable[[], list[str]] | None = None
    carried: Callable[[], None] | None = None
    noted: Callable[[], bool] = _never

    @property
    def resumable(self) -> bool:
        """Whether it can be stopped at any time."""
        return self.kind == "stage"
