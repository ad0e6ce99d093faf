"""The training loop: steps, learning rate, checks, saving, and an orderly end when asked."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import Checkpoints, Resumed
from training.config import Config
from training.curves import draw_curves
from training.data import BatchStream
from training.data.batches import Batch
from training.files import disk_errors
from training.flops import peak_tflops
from training.optim import build_optimizer, make_schedule, set_lr
from training.parallel import Devices
from training.progress import Progress, rewind_metrics
from training.stage import Stage, StepResult
from training.tracing import StepTrace
from vllm_attnedit.errors import AttnEditError


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: all steps were taken; otherwise it was asked to stop and can be resumed.
        checkpoint: the last one.
        step: how many steps were taken in all.
    """

    finished: bool
    checkpoint: Path
    step: int


def total_steps(config: Config) -> int:
    """Steps of the whole run: the tokens it asks for, rounded up to whole steps."""
    return math.ceil(config.optim.tokens / (config.optim.batch * config.data.sequence_length))


@contextmanager
def _termination() -> Iterator[Callable[[], bool]]:
    """Yields a question: has somebody sent SIGTERM? The signal itself interrupts nothing."""
    asked = False

    def note(_number: int, _frame: object) -> None:
        nonlocal asked
        asked = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, before)


class Loop:
    """One run of a stage.

    Args:
        stage: what to train.
        config: of the run.
        devices: of the run.
        stream: its batches.
        checkpoints: where its state goes.
        say: prints a line.
        began: when the run began, by :func:`time.monotonic`; by default now. ``run.minutes`` count
            from there, with the time that models and data took.
    """

    def __init__(
        self,
        stage: Stage,
        config: Config,
        devices: Devices,
        stream: BatchStream,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
        began: float | None = None,
    ) -> None:
        self._stage, self._config, self._devices = stage, config, devices
        self._stream, self._checkpoints, self._say = stream, checkpoints, say
        self._folder = Path(config.output)
        self._optimizer = build_optimizer(stage.groups, config.optim, devices.device)
        self._resumed = Resumed()
        self._saved_at = time.monotonic()
        self._began = self._saved_at if began is None else began

    def run(self) -> Outcome:
        """Train to the end, or until SIGTERM or the time limit.

        Raises:
            AttnEditError: for a loss or gradient that is not finite, a disk that fails, or an
                operation that cannot repeat every bit; the last good checkpoint stays.
        """
        # Progress, curves and TensorBoard write as well.
        with disk_errors(self._folder), self._devices.strict():
            return self._run()

    def _run(self) -> Outcome:
        self._resumed = self._checkpoints.resume(self._stage, self._optimizer)
        first, steps = self._resumed.step, total_steps(self._config)
        schedule = make_schedule(self._config.optim, steps, self._resumed.restarted)
        if self._resumed.path is not None:
            self._say(f"resumed from {self._resumed.path}: {first} of {steps} steps are done")
            if self._resumed.restarted == first > 0:
                self._say("AdamW's moments were not kept: the learning rate rises anew")
        progress = self._start_progress(first, steps)
        traced = self._config.log.profile if self._devices.main else None
        trace = StepTrace(self._folder, traced, first, self._devices.device)
        step, stopped = first, False
        try:
            with _termination() as asked:
                for batches in self._stream.steps(first, steps):
                    spent = trace.before(step)
                    if progress is not None:
                        progress.skip(spent)
                    lr = set_lr(self._optimizer, schedule.factor(step))
                    row = self._step(step, batches) | {"lr": lr}
                    step += 1
                    flops = self._stage.flops(batches) * self._devices.ranks
                    if progress is not None:
                        progress.report(step, row, flops)
                    stopped, due = self._wishes(step, asked)
                    if stopped and step < steps:
                        break
                    if due and step < steps:
                        began = time.monotonic()
                        self._save(step)
                        if progress is not None:
                            progress.skip(time.monotonic() - began)
                path = self._save(step)
        finally:
            trace.close()
            if progress is not None:
                progress.close()
        return Outcome(step == steps, path, step)

    def _start_progress(self, first: int, steps: int) -> Progress | None:
        if not self._devices.main:
            return None
        rewind_metrics(self._folder, first)
        log, device = self._config.log, self._devices.device
        peak = log.peak_tflops
        if peak is None and device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(device))
        return Progress(
            self._folder,
            first=first,
            steps=steps,
            step_tokens=self._config.optim.batch * self._config.data.sequence_length,
            every=log.every,
            peak=peak * 1e12 * self._devices.ranks if peak else None,
            tensorboard=log.tensorboard,
            say=self._say,
        )

    def _step(self, step: int, batches: list[Batch]) -> dict[str, Any]:
        result = self._stage.run(batches)
        norm = self._stage.clip(self._config.optim.clip)
        names = ["loss", "grad_norm", *result.metrics]
        scalars = torch.stack([result.loss, norm.to(result.loss), *result.metrics.values()])
        values = dict(zip(names, scalars.tolist()))  # the one wait for the device in a step
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        if self._devices.any(not finite):
            raise self._not_finite(step, batches, result)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if result.layers is not None:
            named = zip(self._stage.layers, result.layers.tolist())
            values["layers"] = {str(layer): value for layer, value in named}
        return values

    def _not_finite(self, step: int, batches: list[Batch], result: StepResult) -> AttnEditError:
        where = self._stage.blame(batches, result)
        kept = self._checkpoints.newest()
        fix = "lower the learning rate or optim.clip, or look at the data; " + (
            f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
        )
        value = f"not finite at step {step + 1}: {where}"
        return AttnEditError("loss", value, fix)

    def _wishes(self, step: int, asked: Callable[[], bool]) -> tuple[bool, bool]:
        """Whether to stop, and whether a checkpoint is due: the same on every process."""
        how, now = self._config.checkpoint, time.monotonic()
        minutes = self._config.run.minutes
        stop = asked() or (minutes is not None and now - self._began >= 60 * minutes)
        due = how.every_steps is not None and step % how.every_steps == 0
        if how.every_minutes is not None and now - self._saved_at >= 60 * how.every_minutes:
            due = True
        if self._devices.ranks > 1:
            wishes = torch.tensor([float(stop), float(due)], device=self._devices.device)
            stop, due = (value > 0 for value in self._devices.sum(wishes).tolist())
        return stop, due

    def _save(self, step: int) -> Path:
        path = self._checkpoints.save(self._stage, self._optimizer, step, self._resumed)
        self._saved_at = time.monotonic()
        if self._devices.main and self._config.log.curves:
            draw_curves(self._folder)
        return path
