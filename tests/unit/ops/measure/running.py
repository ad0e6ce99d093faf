"""What measuring has in common: running twice, and the batch in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from tests.unit.ops.batches import PagedBatch, double


def twice(run: Any, out: Tensor, written: int) -> Tensor:
    """``out`` after ``run(out)``, which must leave padding alone and give the same bits again."""
    run(out)
    assert out[written:].isnan().all(), "padding was written"
    again = torch.full_like(out, math.nan)
    run(again)
    assert torch.equal(out[:written], again[:written]), "two runs differ"
    return out[:written]


def window_arguments(batch: PagedBatch, *dense: str) -> dict[str, Any]:
    """What window operators take of a batch; ``dense`` names the chunk's own tensors."""
    shared = (
        "q",
        "key_cache",
        "value_cache",
        "block_table",
        "seq_lens",
        "query_start_loc",
        "gate",
        "k_scale",
        "v_scale",
    )
    return {name: getattr(batch, name) for name in (*shared, *dense)}


def wide_batch(batch: PagedBatch) -> PagedBatch:
    """The same values in float64; quantised caches stay, for the oracle to read."""
    fields = {
        name: getattr(batch, name).double() for name in ("q", "k", "v", "key_cache", "value_cache")
    }
    return dataclasses.replace(batch, **fields, gate=double(batch.gate))
