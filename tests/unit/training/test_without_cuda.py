"""Training calls nothing of ``torch.cuda`` where the device is another one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.training.small import small_config
from training.parallel import Devices
from training.runs import train

OURS = ("training", "vllm_attnedit")


def forbidden(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """``original`` for torch and accelerate, which ask it on every device; no answer for us."""

    def call(*arguments: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] in OURS:
            raise AssertionError(f"{caller} calls torch.cuda.{name}")
        return original(*arguments, **options)

    return call


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in torch.cuda.__all__:
        original = getattr(torch.cuda, name)
        if callable(original) and not isinstance(original, type):
            monkeypatch.setattr(torch.cuda, name, forbidden(name, original))


def test_the_trap_springs(no_cuda):
    code = compile("torch.cuda.is_available()", "x", "eval")
    with pytest.raises(AssertionError, match=r"training.made_up calls torch.cuda.is_available"):
        eval(code, {"torch": torch, "__name__": "training.made_up"})
    assert torch.cuda.is_available() in (True, False)


@pytest.mark.parametrize("target", ["pair", "latent_pair"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_run_and_its_resumption(
    no_cuda, request: pytest.FixtureRequest, tmp_path: Path, text: Path, stage: str, target: str
):
    pair = request.getfixturevalue(target)
    config = small_config(tmp_path, *pair, text, checkpoint={"every_steps": 2})
    assert train(config, stage).finished
    assert train(config, stage).finished  # finds itself done


def test_the_device_answers_for_itself(monkeypatch: pytest.MonkeyPatch):
    """Name and generators come from the device's own module, whatever it is called."""
    npu = SimpleNamespace(get_device_name=lambda device: f"Ascend on {device}")
    monkeypatch.setattr(torch, "get_device_module", lambda device: npu)
    devices = Devices.__new__(Devices)
    devices.device = torch.device("meta")
    assert devices.api is npu
    assert devices.name == "Ascend on meta"
    devices.device = torch.device("cpu")
    assert devices.api is None and devices.name == "cpu"
