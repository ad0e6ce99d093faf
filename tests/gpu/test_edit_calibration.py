"""An MLA edit's calibration on the GPU: the statistics of the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.unit.edit.test_calibration import TEXT
from tests.unit.tiny import tiny_teacher
from vllm_attnedit.edit.calibration import run_statistics
from vllm_attnedit.edit.teacher import open_teacher

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_statistics_do_not_depend_on_the_device(tmp_path, family):
    with open_teacher(tiny_teacher(family, tmp_path / "teacher")) as teacher:
        expected = list(run_statistics(teacher, TEXT))
        found = list(run_statistics(teacher, dataclasses.replace(TEXT, device="cuda")))
    assert len(found) == len(expected) == 4
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in ((mine.query, theirs.query), (mine.key, theirs.key)):
            assert torch.allclose(a.matrix, b.matrix, atol=1e-4)
            assert a.mean is not None and b.mean is not None
            assert torch.allclose(a.mean, b.mean, atol=1e-4)
        assert mine.distances is not None and theirs.distances is not None
        assert torch.allclose(mine.distances, theirs.distances, atol=1e-3)
