"""``attnedit doctor``: its report and exit status, and the real machine that it asks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.command import Attnedit, attnedit
from tests.unit.doctor.fake_host import TORCH
from vllm_attnedit.doctor import Finding, Host, ProbeError, checks

__all__ = ["attnedit"]


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
