"""Rung d: what ``attnedit doctor --device npu`` asks of a device, asked of the reference."""

from __future__ import annotations

import pytest
import torch_npu

from vllm_attnedit.doctor.probes import ascend


@pytest.mark.parametrize("paged", [False, True])
def test_the_probe_reads_the_band(paged, monkeypatch):
    assert ascend.seen_keys(torch_npu, "cpu", paged=paged) == ascend.expected_keys()
    monkeypatch.setattr(ascend, "WINDOW", ascend.WINDOW + 1)
    one_more = ascend.seen_keys(torch_npu, "cpu", paged=paged)
    monkeypatch.undo()
    assert one_more != ascend.expected_keys()
    assert len(one_more[-1]) == ascend.WINDOW + 1
