"""Whether Triton's interpreter runs a kernel with a loop on this NumPy (TRITON_INTERPRET=1)."""

from __future__ import annotations

import json
from typing import Any

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def _row_sums(x: Any, count: Any, y: Any, BLOCK: tl.constexpr) -> None:
    # The loop bound is loaded: turning it into a Python integer is what a NumPy can break.
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.load(count)):
        total += tl.load(x + row * BLOCK + tl.arange(0, BLOCK))
    tl.store(y + tl.arange(0, BLOCK), total)


def main() -> None:
    """Print the versions and whether the kernel gave the right sums."""
    x = torch.arange(64.0).view(4, 16)
    y = torch.full((16,), torch.nan)
    _row_sums[(1,)](x, torch.tensor([3]), y, BLOCK=16)
    right = torch.equal(y, x[:3].sum(0))
    print(json.dumps({"triton": triton.__version__, "numpy": numpy.__version__, "right": right}))


if __name__ == "__main__":
    main()
