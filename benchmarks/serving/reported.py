"""What a server said of its KV cache when it started, read from its log."""

from __future__ import annotations

import re
from typing import Any

_CONCURRENCY = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")
_POOL = re.compile(r"KV cache size: ([\d,]+) tokens")
# The second form is the CPU worker's.
_MEMORY = re.compile(r"(?:Available KV cache memory: |(?:Explicitly|Auto) set \()([\d.]+)")
_GIB = 1 << 30


def kv_report(log: str) -> dict[str, Any]:
    """KV figures of all engines; ``None`` where the log says nothing.

    Args:
        log: text of it. Each copy of a data-parallel model has an engine, which reports for itself;
            the ranks of a tensor-parallel one hold equal pools.

    Returns:
        ``reported_concurrency`` (requests of ``reported_length`` tokens that fit at once) and
        ``kv_tokens``, both over all engines; ``reported_bytes``, the KV memory of a device, and
        ``reported_bytes_per_request``, what one such request takes of it.
    """
    concurrency = [float(found[2]) for found in _CONCURRENCY.finditer(log)]
    length = _CONCURRENCY.search(log)
    pools = [_integer(found[1]) for found in _POOL.finditer(log)]
    memory = min((float(found[1]) for found in _MEMORY.finditer(log)), default=None)
    held = None if memory is None else int(memory * _GIB)
    return {
        "reported_concurrency": sum(concurrency) if concurrency else None,
        "reported_length": _integer(length[1]) if length else None,
        "kv_tokens": sum(pools) if pools else None,
        "reported_bytes": held,
        "reported_bytes_per_request": int(held / min(concurrency))
        if held and concurrency and min(concurrency)
        else None,
    }


def _integer(text: str) -> int:
    return int(text.replace(",", ""))
