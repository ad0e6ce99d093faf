"""What a run shows while it lasts: a line for people, a JSON line for programs, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

from training.files import write_json

METRICS, SPEED = "metrics.jsonl", "speed.json"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run so far; a line that a killed process left unfinished is dropped."""
    path = folder / METRICS
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def rewind_metrics(folder: Path, step: int) -> None:
    """Forget the steps after ``step``: the run will take them again."""
    kept = [row for row in read_metrics(folder) if row["step"] <= step]
    if kept or (folder / METRICS).is_file():
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (folder / METRICS).write_text(text, encoding="utf-8")


class Progress:
    """Reports steps of the main process.

    Args:
        folder: of the run.
        first: the first step of this process, from 0.
        steps: of the whole run.
        step_tokens: tokens of a step, over all processes.
        every: steps between two lines.
        peak: floating-point operations a second that all devices could do; ``None``: not known.
        tensorboard: write TensorBoard files.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first: int,
        steps: int,
        step_tokens: int,
        every: int,
        peak: float | None,
        tensorboard: bool,
        say: Callable[[str], None] = print,
    ) -> None:
        self._steps, self._step_tokens, self._every, self._peak = steps, step_tokens, every, peak
        self._say, self._first, self._last_step = say, first, first
        self._last_time = self._began = self._step_began = time.monotonic()
        self._step_seconds: list[float] = []
        self._flops = 0.0
        self._folder = folder
        self._total = {"tokens": 0.0, "seconds": 0.0, "flops": 0.0}
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            # Slow to import, and only the main process of a run needs it.
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=first)
        self.tokens_per_second: float | None = None
        self.mfu: float | None = None

    def due(self, step: int) -> bool:
        """Whether the step just taken (counted from 1) gets a line."""
        return step % self._every == 0 or step == self._steps or step == 1

    def report(self, step: int, row: dict[str, Any], flops: float) -> None:
        """Note a step.

        Args:
            step: that was just taken, counted from 1.
            row: its numbers; ``loss`` and ``lr`` are among them.
            flops: that it needed, over all processes.
        """
        tokens = step * self._step_tokens
        self._file.write(json.dumps({"step": step, "tokens": tokens, **row}) + "\n")
        self._file.flush()
        self._flops += flops
        now = time.monotonic()
        if step > self._first + 1:  # the first step's time is the compiler's
            self._step_seconds.append(now - self._step_began)
        self._step_began = now
        if not self.due(step):
            return
        seconds = max(now - self._last_time, 1e-9)
        self.tokens_per_second = (step - self._last_step) * self._step_tokens / seconds
        speed = f"{_short(self.tokens_per_second)} tok/s"
        if self._peak:
            self.mfu = self._flops / seconds / self._peak
            speed += f", MFU {100 * self.mfu:.1f}%"
        if self._last_step > self._first:
            # The first line's time is the compiler's.
            taken = (step - self._last_step) * self._step_tokens
            for name, amount in (("tokens", taken), ("seconds", seconds), ("flops", self._flops)):
                self._total[name] += amount
        left = (self._steps - step) * seconds / max(1, step - self._last_step)
        extra = "".join(
            f", {name} {value:.4f}"
            for name, value in row.items()
            if name in ("kl", "agreement", "cosine")
        )
        self._say(
            f"step {step}/{self._steps}  {_short(tokens)} tokens  loss {row['loss']:.5f}{extra}  "
            f"lr {row['lr']:.2e}  {speed}  {_clock(left)} left"
        )
        if self._board is not None:
            scalars = {k: v for k, v in row.items() if isinstance(v, float)}
            scalars |= {f"layers/{i}": v for i, v in row.get("layers", {}).items()}
            scalars |= {"tokens_per_second": self.tokens_per_second}
            scalars |= {"mfu": self.mfu} if self.mfu is not None else {}
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        self._last_step, self._last_time, self._flops = step, now, 0.0

    def skip(self, seconds: float) -> None:
        """Leave out the time that something else took, such as saving: it is no step's."""
        self._last_time += seconds
        self._step_began += seconds

    def close(self) -> None:
        """Close files, and note how fast this part of the run was."""
        self._file.close()
        if self._total["seconds"]:
            rate = self._total["tokens"] / self._total["seconds"]
            speed: dict[str, Any] = {**self._total, "tokens_per_second": rate}
            speed["peak_flops"] = self._peak
            if self._peak:
                speed["mfu"] = self._total["flops"] / self._total["seconds"] / self._peak
            if len(self._step_seconds) > 1:
                low, median, high = quantiles(self._step_seconds, n=4)
                speed["step_seconds"] = {"median": median, "p25": low, "p75": high}
                speed["steps"] = len(self._step_seconds)
            write_json(self._folder / SPEED, speed)
        if self._board is not None:
            self._board.close()


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True, file=sys.stdout)


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
