"""Traces a few steps of a run with torch's profiler, so that one can see where its time goes."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

TRACE = "trace.json.gz"
WARM_UP = 20
"""Steps of a process before its trace: compilers and allocators have settled by then."""


class StepTrace:
    """Writes ``trace.json.gz``, a Chrome trace of ``count`` steps of this process.

    Args:
        folder: of the run.
        count: steps to trace; ``None``: none.
        first: the first step that this process takes, from 0.
        device: of the run.
    """

    def __init__(self, folder: Path, count: int | None, first: int, device: torch.device) -> None:
        self._path = folder / TRACE
        self._begin = None if count is None else first + WARM_UP
        self._end = None if count is None else first + WARM_UP + count
        self._device = device
        self._profile: profile | None = None

    def before(self, step: int) -> float:
        """Begin or end the trace, if it is time before ``step``; returns the seconds it took."""
        began = time.monotonic()
        if step == self._begin:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        elif step == self._end and self._profile is not None:
            self.close()
        return time.monotonic() - began

    def close(self) -> None:
        """End the trace, if there is one; what was traced is written."""
        if self._profile is not None:
            self._profile.stop()
            # A trace is whole or not there. The profiler compresses by the last suffix.
            part = self._path.with_name(f".{self._path.name}")
            self._profile.export_chrome_trace(str(part))
            part.replace(self._path)
            self._profile = None
