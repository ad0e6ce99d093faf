"""Which implementation of an operator runs on which device."""

from __future__ import annotations

import functools
import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from vllm_attnedit.errors import AttnEditError

#: ``reference`` forces the oracles everywhere: a slow run to compare a fast one with.
OVERRIDE_VARIABLE = "VLLM_ATTNEDIT_OPS"

_CHOICES = ("auto", "reference", "triton")
# A device without an entry runs the oracle, which is plain torch.
_BY_DEVICE = {"cuda": "triton", "npu": "ascend"}


@functools.cache
def _runs_on_ascend(operator: str) -> bool:
    """Whether there is a kernel for it, and Triton for Ascend to compile it."""
    if find_spec("triton") is None or find_spec("triton.backends.ascend") is None:
        return False
    return find_spec(f"vllm_attnedit.ops.{operator}.ascend") is not None


def implementation(operator: str, device: torch.device) -> ModuleType:
    """The module that runs ``operator`` on ``device``, imported on first use.

    Args:
        operator: a folder of :mod:`vllm_attnedit.ops`.
        device: where the operator's arguments live.

    Raises:
        AttnEditError: ``VLLM_ATTNEDIT_OPS`` holds something else than auto, reference or triton.
    """
    choice = os.environ.get(OVERRIDE_VARIABLE, "auto")
    if choice not in _CHOICES:
        raise AttnEditError(OVERRIDE_VARIABLE, choice, f"choose one of {', '.join(_CHOICES)}")
    if choice == "auto":
        choice = _BY_DEVICE.get(device.type, "reference")
        if choice == "ascend" and not _runs_on_ascend(operator):
            choice = "reference"
    return import_module(f"vllm_attnedit.ops.{operator}.{choice}")
