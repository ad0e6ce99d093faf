"""Run a kernel on a random batch and measure it against its oracle in float64.

Called in process on a GPU, and in a worker process where Triton interprets kernels on the CPU.
Each function returns the relative L2 error, after checking what holds for every operator: the
output was poisoned and is finite now, padding is untouched, and a second run gives the same bits.
"""

from __future__ import annotations

from tests.unit.ops.measure.beside import GateCase, WriteCase, gate_error, write_error
from tests.unit.ops.measure.latent import (
    ExpandedCase,
    LatentCase,
    latent_decode_error,
    latent_prefill_error,
)
from tests.unit.ops.measure.window import decode_error, prefill_error

__all__ = [
    "ExpandedCase",
    "GateCase",
    "LatentCase",
    "WriteCase",
    "decode_error",
    "gate_error",
    "latent_decode_error",
    "latent_prefill_error",
    "prefill_error",
    "write_error",
]
