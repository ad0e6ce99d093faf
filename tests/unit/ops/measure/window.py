"""GateSWA decode and prefill."""

from __future__ import annotations

from typing import Any

import torch

from tests.unit.ops.batches import WindowCase, poisoned, relative_error, window_batch
from tests.unit.ops.measure.running import twice, wide_batch, window_arguments


def decode_error(case: WindowCase, device: str = "cpu") -> float:
    from vllm_attnedit.ops.gateswa_decode import config, reference
    from vllm_attnedit.ops.gateswa_decode import triton as kernel

    batch = window_batch(case, device, chunk_in_cache=True)
    max_query_len = max(1, *(step for _, step in case.requests))
    arguments: dict[str, Any] = {
        "sliding_window": case.window,
        "scale": case.head_dim**-0.5,
        "max_query_len": max_query_len,
        "workspace": None,
    }
    launch: Any = None
    if case.config:
        kind = config.HopperConfig if "single" in case.config else config.DecodeConfig
        launch = kind(**case.config)
    got = twice(
        lambda out: kernel.gateswa_decode(
            **window_arguments(batch), **arguments, out=out, config=launch
        ),
        poisoned(tuple(batch.q.shape), batch.q.dtype, device),
        batch.written,
    )
    wide = wide_batch(batch)
    expected = reference.gateswa_decode(
        **window_arguments(wide), **arguments, out=torch.empty_like(wide.q)
    )
    return relative_error(got, expected[: batch.written])


def prefill_error(case: WindowCase, device: str = "cpu") -> float:
    from vllm_attnedit.ops.gateswa_prefill import reference
    from vllm_attnedit.ops.gateswa_prefill import triton as kernel

    batch = window_batch(case, device, chunk_in_cache=False)
    arguments: dict[str, Any] = {"sliding_window": case.window, "scale": case.head_dim**-0.5}
    launch = kernel.PrefillConfig(**case.config) if case.config else None
    got = twice(
        lambda out: kernel.gateswa_prefill(
            **window_arguments(batch, "k", "v"), **arguments, out=out, config=launch
        ),
        poisoned(tuple(batch.q.shape), batch.q.dtype, device),
        batch.written,
    )
    wide = wide_batch(batch)
    expected = reference.gateswa_prefill(
        **window_arguments(wide, "k", "v"), **arguments, out=torch.empty_like(wide.q)
    )
    return relative_error(got, expected[: batch.written])
