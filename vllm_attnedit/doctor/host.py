"""What the checks may ask of the machine. Tests give answers of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from vllm_attnedit import compat

PLUGIN_GROUP = "vllm.general_plugins"
_PROBES = Path(__file__).parent / "probes"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        status: ``ok``, ``warn`` (works, with a limit) or ``fail``.
        message: one line, what was found.
        mend: for anything but ``ok``, what to do about it, as an imperative sentence.
    """

    status: Literal["ok", "warn", "fail"]
    message: str
    mend: str | None = None


class ProbeError(RuntimeError):
    """A probe or command that failed, or did not end in time; one line of text."""


@dataclass
class Host:
    """This machine.

    Attributes:
        device: the kind that the user means to serve on, ``cpu``, ``cuda`` or ``npu``; ``None``
            takes the one that vLLM would choose.
        environ: environment variables.
        timeout: seconds that a probe may take.
    """

    device: str | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    timeout: float = 300.0
    python: tuple[int, int] = sys.version_info[:2]

    def version(self, distribution: str) -> str | None:
        """Version of an installed distribution."""
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return None

    def requirements(self, distribution: str) -> list[str]:
        """What an installed distribution requires, as in its metadata."""
        try:
            return metadata.requires(distribution) or []
        except metadata.PackageNotFoundError:
            return []

    def vllm(self) -> tuple[str, str] | None:
        """The installed host as (distribution, version)."""
        return compat.installed_vllm()

    def vllm_problem(self) -> str | None:
        """Why the installed vLLM cannot host the plugin."""
        return compat.vllm_problem()

    def plugins(self) -> dict[str, str]:
        """vLLM's general plugins: ``module:function`` by entry point name."""
        return {e.name: e.value for e in metadata.entry_points(group=PLUGIN_GROUP)}

    def vllm_command(self) -> str | None:
        """Path of the ``vllm`` command: the one beside this Python, else the one on PATH."""
        beside = Path(sys.executable).with_name("vllm")
        return str(beside) if beside.is_file() else shutil.which("vllm")

    def run(self, command: Sequence[str], **environ: str) -> str:
        """Standard output of a command.

        Raises:
            ProbeError: with the last line of its standard error.
        """
        try:
            done = subprocess.run(
                command,
                env={**self.environ, **environ},
                cwd=os.sep,  # a checkout in the current folder is no installation
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=self.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ProbeError(f"no answer within {self.timeout:g} seconds") from error
        except OSError as error:
            raise ProbeError(f"{command[0]}: {error.strerror}") from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise ProbeError(lines[-1].strip() if lines else f"ended with {done.returncode}")
        return done.stdout

    def probe(self, name: str, **environ: str) -> dict[str, Any]:
        """The JSON object that a script of ``doctor/probes`` prints last.

        Raises:
            ProbeError: if the script failed.
        """
        output = self.run([sys.executable, str(_PROBES / f"{name}.py")], **environ)
        try:
            answer: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        except (IndexError, ValueError) as error:
            raise ProbeError(f"the probe {name} printed no JSON") from error
        return answer

    @cached_property
    def devices(self) -> dict[str, Any] | ProbeError:
        """What torch sees, or why it could not be asked."""
        return self._try("devices")

    @cached_property
    def registry(self) -> dict[str, Any] | ProbeError:
        """What vLLM knows, or why it could not be asked."""
        return self._try("registry", VLLM_LOGGING_LEVEL="ERROR")

    def _try(self, name: str, **environ: str) -> dict[str, Any] | ProbeError:
        try:
            return self.probe(name, **environ)
        except ProbeError as error:
            return error
