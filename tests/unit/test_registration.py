"""Registration with the host: the version window, idempotence, and plain words on a mismatch."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap

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


def test_vllm_without_the_plugin_is_as_it_was():
    """What `pip uninstall` leaves: nothing of the plugin is loaded, its model is unknown, and the
    registry of cache specifications holds vLLM's own only."""
    code = """
        import sys
        from vllm.plugins import load_general_plugins
        load_general_plugins()
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.v1 import kv_cache_spec_registry as registry
        assert "AttnEditForCausalLM" not in ModelRegistry.get_supported_archs()
        registry.KVCacheSpecRegistry._ensure_registered()
        owners = {cls.__module__.split(".")[0] for cls in registry._REGISTRY_KVCACHESPEC_LIST}
        assert owners == {"vllm"}, owners
        assert not [name for name in sys.modules if name.startswith("vllm_attnedit")]
    """
    # The one trace of an installed plugin is its entry point; this leaves it unread.
    env = os.environ | {"VLLM_PLUGINS": ""}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
