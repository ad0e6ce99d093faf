"""Registration with the host: the version window, idempotence, and plain words on a mismatch."""

from __future__ import annotations

import logging

import pytest

import vllm_attnedit
from vllm_attnedit import compat


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.23.0", True),
        ("0.23.0+cpu", True),
        ("0.23.1rc1+cu130", True),
        ("0.22.1", False),
        ("0.24.0", False),
        ("0.24.0rc1", False),
        ("1.0", False),
        ("dev", False),
    ],
)
def test_version_window(version: str, supported: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "installed_vllm", lambda: ("vllm", version))
    problem = compat.vllm_problem()
    assert (problem is None) == supported
    if problem:
        assert version in problem
        assert "install vllm" in problem
        assert "\n" not in problem


def test_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "installed_vllm", lambda: None)
    assert "not installed" in str(compat.vllm_problem())


def test_a_mismatch_is_logged_and_registers_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from vllm_attnedit import plugin

    monkeypatch.setattr(compat, "installed_vllm", lambda: ("vllm", "0.99.0"))
    monkeypatch.setattr(plugin, "register_with_vllm", lambda: pytest.fail("registered"))
    with caplog.at_level(logging.ERROR):
        vllm_attnedit.register()
    assert "vllm-attnedit is not registered: vllm 0.99.0 is outside" in caplog.text


def test_registration_is_idempotent_and_lazy():
    from vllm.model_executor.models.registry import ModelRegistry

    vllm_attnedit.register()
    vllm_attnedit.register()
    assert "AttnEditForCausalLM" in ModelRegistry.get_supported_archs()
    entry = ModelRegistry.models["AttnEditForCausalLM"]
    assert entry.module_name == "vllm_attnedit.models.causal_lm"  # a name: nothing imported
