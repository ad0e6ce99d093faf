"""Numbers that a device computes with."""

from __future__ import annotations

import pytest
import torch

from training.attention import choose
from training.config import RunConfig
from training.parallel import Devices


@pytest.mark.parametrize(
    ("precision", "products", "dtype", "kernel"),
    [
        ("bf16", "highest", torch.bfloat16, "varlen"),
        ("tf32", "high", torch.float32, "sdpa"),
        ("fp32", "highest", torch.float32, "sdpa"),
    ],
)
def test_precision(monkeypatch, precision, products, dtype, kernel):
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    devices = Devices(RunConfig(device="cpu", precision=precision, deterministic=False), seed=0)
    assert asked == [products]
    assert devices.compute_dtype == dtype
    with devices.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype
    assert choose("auto", torch.device("cuda"), precision) == kernel
