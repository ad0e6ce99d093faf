"""A small run of every kernel, for a memory or race checker to watch."""

from __future__ import annotations

import torch

from tests.unit.ops import measure
from tests.unit.ops.batches import BOUNDS, WindowCase
from tests.unit.ops.measure import ExpandedCase, GateCase, LatentCase, WriteCase


def main() -> None:
    requests = ((1, 1), (33, 2), (0, 0), (200, 1))
    errors = {
        "gateswa_decode": measure.decode_error(
            WindowCase(dtype="fp16", gate="headwise", window=70, requests=requests, head_dim=128),
            "cuda",
        ),
        "gateswa_decode, Triton": measure.decode_error(
            WindowCase(
                dtype="fp16",
                gate="elementwise",
                window=70,
                requests=requests,
                config={"rows": 16, "tile": 16, "splits": 4},
            ),
            "cuda",
        ),
        "gateswa_prefill": measure.prefill_error(
            WindowCase(
                dtype="fp16", gate="headwise", window=40, requests=((100, 30), (65, 65), (7, 1))
            ),
            "cuda",
        ),
        "mla_decode": measure.latent_decode_error(
            LatentCase(
                dtype="fp16",
                gated=True,
                requests=requests,
                config={"rows": 16, "tile": 16, "splits": 4},
            ),
            "cuda",
        ),
        "mla_prefill": measure.latent_prefill_error(ExpandedCase(dtype="fp16"), "cuda"),
        "kv_write": measure.write_error(WriteCase(dtype="fp16"), "cuda"),
        "sigmoid_gate": measure.gate_error(GateCase(dtype="fp16"), "cuda"),
    }
    torch.cuda.synchronize()
    for operator, error in errors.items():
        print(f"{operator}: {error:.2e}")
        assert error < BOUNDS["fp16"], operator


if __name__ == "__main__":
    main()
