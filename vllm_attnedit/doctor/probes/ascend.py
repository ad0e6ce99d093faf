"""Which keys Ascend's fused attention lets a query see, asked of the device itself.

With queries of zeros every visible key weighs the same, and with one-hot values the output spells
out which ones those are. Run first on a new machine: this project's windows rest on the answer.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

WINDOW, QUERIES, KEYS, WIDTH, BLOCK, MASK = 5, 3, 40, 128, 128, 2048


def seen_keys(operators: Any, device: str, *, paged: bool) -> list[list[int]]:
    """The keys that each of the last queries sees with a band of ``WINDOW - 1`` keys before it.

    Args:
        operators: the module ``torch_npu``.
        device: where to run.
        paged: read keys and values from a page, as decodes do.
    """
    query = torch.zeros(QUERIES, 1, WIDTH, dtype=torch.bfloat16, device=device)
    key = torch.zeros(KEYS, 1, WIDTH, dtype=torch.bfloat16, device=device)
    value = torch.eye(KEYS, WIDTH, dtype=torch.bfloat16, device=device)[:, None]
    options: dict[str, Any] = {}
    if paged:
        pages = torch.zeros(2, 2, BLOCK, WIDTH, dtype=torch.bfloat16, device=device)
        pages[0, 1, :KEYS], pages[1, 1, :KEYS] = key[:, 0], value[:, 0]
        key, value = pages[0], pages[1]
        options = {
            "block_table": torch.ones(1, 1, dtype=torch.int32, device=device),
            "block_size": BLOCK,
        }
    mask = torch.ones(MASK, MASK, dtype=torch.int8).triu(1).to(device)
    output, _ = operators.npu_fused_infer_attention_score(
        query,
        key,
        value,
        atten_mask=mask,
        input_layout="TND",
        actual_seq_lengths=[QUERIES],
        actual_seq_lengths_kv=[KEYS],
        num_heads=1,
        num_key_value_heads=1,
        scale=1.0,
        sparse_mode=4,
        pre_tokens=WINDOW - 1,
        next_tokens=0,
        **options,
    )
    return [_positions(row) for row in output[:, 0].cpu()]


def expected_keys() -> list[list[int]]:
    """``WINDOW`` keys each, the query's own last."""
    own = range(KEYS - QUERIES, KEYS)
    return [list(range(position - WINDOW + 1, position + 1)) for position in own]


def _positions(weights: Tensor) -> list[int]:
    return [int(i) for i in torch.nonzero(weights > 0).flatten()]


def main() -> None:
    """Print, for dense and for paged keys, how many keys a query saw and whether the right ones."""
    operators = import_module("torch_npu")
    answer = {}
    for name, paged in (("dense", False), ("paged", True)):
        seen = seen_keys(operators, "npu", paged=paged)
        answer[name] = {"keys": len(seen[-1]), "right": seen == expected_keys()}
    print(json.dumps({"window": WINDOW, **answer}))


if __name__ == "__main__":
    main()
