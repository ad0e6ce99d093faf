"""What the device can do, measured in the same run: the ceilings that kernels are held against."""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import statistics
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.kernels.timing import GRAPH_US, Replay, rotation

#: Elements of 2 bytes that a program of the reading kernel takes, in steps of one load.
_STEP, _STEPS = 4096, 4


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written: the better of two ways.

    A copy node of a graph uses the copy engines, which do not fill the memory system; a kernel
    that writes what it reads does.
    """
    source = torch.randn(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    traffic = 2 * source.numel() * source.element_size()
    best = 0.0
    for call in (lambda: target.copy_(source), lambda: torch.mul(source, 1, out=target)):
        times = Replay([call], expected_us=GRAPH_US).times(7)
        best = max(best, traffic / statistics.median(times) / 1e3)
    return best


def matmul_rate() -> float:
    """TFLOP/s of an 8192-cubed bfloat16 product on random data."""
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    replay = Replay([lambda: torch.mm(a, b, out=out)], expected_us=GRAPH_US)
    return 2 * n**3 / statistics.median(replay.times(7)) / 1e6


@triton.jit
def _read_kernel(source_ptr, target_ptr, STEP: tl.constexpr, STEPS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (STEP * STEPS)
    total = tl.zeros([STEP], tl.float32)
    for i in tl.static_range(STEPS):
        total += tl.load(source_ptr + start + i * STEP + tl.arange(0, STEP)).to(tl.float32)
    tl.store(target_ptr + tl.program_id(0), tl.sum(total))


def read_floor_us(traffic: int) -> float:
    """Microseconds of a kernel that only reads ``traffic`` bytes, in one contiguous piece.

    No kernel that must read as much from memory can be much faster: it contains the cost of a
    launch, of filling the memory system and of draining it, which small batches mostly consist of.
    """
    programs = triton.cdiv(traffic // 2, _STEP * _STEPS)
    elements = programs * _STEP * _STEPS
    sets = rotation(traffic)
    source = torch.randn(sets * elements, dtype=torch.bfloat16, device="cuda")
    target = torch.empty(programs, device="cuda")

    def read(piece: Tensor) -> None:
        _read_kernel[(programs,)](piece, target, STEP=_STEP, STEPS=_STEPS, num_warps=4)

    calls = [partial(read, piece) for piece in source.view(sets, elements)]
    return statistics.median(Replay(calls, traffic / 4e6).times(7))
