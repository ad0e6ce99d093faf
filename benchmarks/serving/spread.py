"""How a system's model lies on its devices: split over them, copied, or both.

Every system of a benchmark gets the same number of devices (``server.devices``). Tensor parallelism
splits one copy over them; a system may ask for smaller groups, each with a copy of its own and its
share of the requests (data parallelism), as latents are better served, which no group can split.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_attnedit.errors import AttnEditError

if TYPE_CHECKING:
    from benchmarks.serving.options import Server
    from benchmarks.serving.system import System

OPTIONS = (
    "--tensor-parallel-size", "-tp", "--data-parallel-size", "-dp", "--data-parallel-size-local",
    "-dpl", "--pipeline-parallel-size", "-pp", "--prefill-context-parallel-size", "-pcp",
    "--api-server-count", "-asc",
)  # fmt: skip
"""Of ``vllm serve``: what decides how many devices and front ends there are."""


@dataclass(frozen=True)
class Spread:
    """Devices of a copy, and copies."""

    tensor: int
    data: int

    @property
    def devices(self) -> int:
        return self.tensor * self.data

    @property
    def label(self) -> str:
        """``TP2``, ``DP2``, ``TP2xDP2``, or nothing for a single device."""
        parts = {"TP": self.tensor, "DP": self.data}
        return "x".join(f"{name}{size}" for name, size in parts.items() if size > 1)

    def arguments(self) -> list[str]:
        """For ``vllm serve``.

        vLLM would start as many API servers as there are copies, and a single one for a split
        model: here every system has one.
        """
        found = []
        if self.tensor > 1:
            found += ["--tensor-parallel-size", str(self.tensor)]
        if self.data > 1:
            found += ["--data-parallel-size", str(self.data), "--api-server-count", "1"]
        return found


def spread_of(system: System, server: Server) -> Spread:
    """Of one system; its groups fill the devices, as the options' schema makes sure."""
    tensor = system.tensor_parallel or server.devices
    return Spread(tensor, server.devices // tensor)


def count_devices(field: str = "server.devices") -> int:
    """Accelerators of this machine that a program would see.

    Asked in a process of its own: what opens a GPU keeps some of its memory.

    Args:
        field: how the user spells the number, for messages.

    Raises:
        AttnEditError: if there is none.
    """
    code = "import torch; print(torch.accelerator.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count = int(done.stdout.split()[-1])
    if not count:
        fix = "there is no accelerator here: give a number (--devices)"
        raise AttnEditError(field, "all", fix)
    return count
