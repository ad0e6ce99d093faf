"""vllm-ascend as its worker sets it up, without a device."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from vllm.platforms import current_platform

from tests.ascend import layer_operators, mla_operators, npu_operators
from vllm_attnedit.backends import ascend_limits


def prepare() -> None:
    """vllm-ascend's patches of vLLM, in a worker's order, and CPU kernels for its operators."""
    if current_platform.device_type != "npu":
        raise pytest.UsageError("these tests need vllm-ascend: run scripts/test_ascend.sh")
    from vllm_ascend.utils import adapt_patch

    adapt_patch(is_global_patch=True)
    adapt_patch()
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    npu_operators.install()
    mla_operators.install()
    layer_operators.install()


# Before test modules are imported: vllm-ascend's own modules import each other in a circle, which
# only the worker's order takes apart.
prepare()


@pytest.fixture(autouse=True)
def without_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would ask the device; and float32, which it does not take, makes tests exact."""
    monkeypatch.setattr(torch_npu.npu, "current_device", lambda: 0)
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *shape, pin_memory=False, **options: zeros(*shape, **options)
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
    monkeypatch.setattr(ascend_limits, "DTYPES", (*ascend_limits.DTYPES, "float32"))
