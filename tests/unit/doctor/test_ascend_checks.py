"""``attnedit doctor --device npu``: each Ascend check on a whole machine, and broken in one way."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.doctor.fake_host import FakeHost, torch_with
from vllm_attnedit.doctor import ASCEND_CHECKS, ProbeError
from vllm_attnedit.doctor.checks import check_transformers
from vllm_attnedit.doctor.probes import ascend

NPU = {"name": "Ascend910B3", "bf16": True}
RIGHT = {"keys": 5, "right": True}
BAND = {"window": 5, "dense": RIGHT, "paged": RIGHT}


def npu_host(**changes: Any) -> FakeHost:
    """A whole machine with two NPUs; ``answers`` and other fields break parts of it."""
    versions = {"torch": "2.10.0", "torch-npu": "2.10.0.post4", "transformers": "5.23.0"}
    answers = torch_with(npu=[NPU, NPU], triton={"version": "3.2.0", "driver": "npu"})
    values: dict[str, Any] = {
        "device": "npu",
        "host": ("vllm-ascend", "0.23.0"),
        "environ": {"ASCEND_HOME_PATH": "/usr/local/Ascend"},
        "versions": versions,
        "needs": {"vllm-ascend": ["torch-npu==2.10.0.post4", "transformers==5.5.4"]},
        "answers": answers | {"ascend": BAND} | changes.pop("answers", {}),
    }
    return FakeHost(**(values | changes))


def test_a_whole_machine_passes() -> None:
    host = npu_host()
    findings = {name: check(host) for name, check in ASCEND_CHECKS}
    assert {f.status for f in findings.values()} == {"ok"}, findings
    assert findings["chip"].message == "Ascend910B3"
    assert findings["window of the fused attention"].message == "a window of 5 is 5 keys"


BROKEN: list[tuple[str, dict[str, Any], str, str, str]] = [
    # check, what is different, status, part of the message, part of the advice
    ("CANN", {"environ": {}}, "fail", "ASCEND_HOME_PATH", "set_env.sh"),
    ("torch_npu", {"versions": {}}, "fail", "not installed", "vllm-ascend"),
    ("torch_npu", {"versions": {"torch-npu": "2.9.0"}}, "fail", "wants ==2.10.0.post4", "again"),
    ("chip", {"answers": torch_with(npu=[])}, "warn", "no chip", "910B"),
    ("chip", {"answers": torch_with(npu=[{"name": "Ascend310P3"}])}, "warn", "310P3", "verify"),
    ("chip", {"answers": torch_with(npu={"error": "x"})}, "warn", "not checked", "mend"),
    ("Triton for Ascend", {"answers": torch_with(npu=[NPU])}, "warn", "torch", "triton-ascend"),
    (
        "window of the fused attention",
        {"answers": {"ascend": ProbeError("RuntimeError: 561002")}},
        "fail",
        "561002",
        "CANN",
    ),
    (
        "window of the fused attention",
        {"answers": {"ascend": BAND | {"paged": {"keys": 6, "right": False}}}},
        "fail",
        "paged 6 keys",
        "do not serve",
    ),
]


@pytest.mark.parametrize(("name", "changes", "status", "message", "mend"), BROKEN)
def test_each_breakage_is_found(
    name: str, changes: dict[str, Any], status: str, message: str, mend: str
) -> None:
    finding = dict(ASCEND_CHECKS)[name](npu_host(**changes))
    assert finding.status == status
    assert message in finding.message
    assert mend in (finding.mend or "")


def test_every_check_is_broken_once() -> None:
    assert {name for name, *_ in BROKEN} == {name for name, _ in ASCEND_CHECKS}


def test_the_hosts_own_pin_of_transformers_does_not_count() -> None:
    assert check_transformers(npu_host()).status == "ok"


def test_a_window_counts_the_query_itself() -> None:
    assert ascend.expected_keys()[-1] == [35, 36, 37, 38, 39]
