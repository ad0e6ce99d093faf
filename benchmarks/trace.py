"""Reads what torch's profiler writes: the share of each kind of work in a device's time.

``idle`` is the time in which the device waits for its host. On a CPU there is no such device, and
shares are of operators' own time.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_attnedit.errors import AttnEditError

Kinds = tuple[tuple[str, str], ...]
"""Names of kinds, and patterns of the kernels and operators that belong to them."""

# The first that matches a kernel's or an operator's name counts.
SERVING: Kinds = (
    ("KV writes", r"reshape_and_cache|kv_write|concat_and_cache"),
    ("MoE", r"moe|expert|topkGating|grouped_topk"),
    ("attention", r"attention|attn|flash|fmha|gateswa|mla_|_mla|unified_|paged"),
    ("sampling", r"sampl|argmax|multinomial|top_?k|top_?p|softmax|cumsum|sort|exponential"),
    ("GEMM", r"gemm|gemv|cutlass|nvjet|cublas|xmma|splitK|matmul|addmm|_mm\b|::mm\b|linear"),
    ("copies", r"memcpy|memset|copy_|_to_copy|aten::to\b|index_select|gather"),
    ("norms, RoPE, activations", r"norm|rotary|rope|silu|swiglu|act_and_mul|triton_|elementwise"),
)
TRAINING: Kinds = (
    ("loss over the vocabulary", r"softmax|argmax|logsumexp"),
    # What the compiler fused, whatever operators its name lists.
    ("norms, RoPE, activations", r"^triton_"),
    ("attention", r"flash|fmha|varlen|flex_attention|sdpa|scaled_dot"),
    ("GEMM", r"gemm|gemv|cutlass|nvjet|cublas|xmma|splitK|matmul|addmm|_mm\b|::b?mm\b|linear"),
    ("optimiser, clipping", r"adam|multi_tensor|foreach|lpnorm|vector_norm"),
    ("copies", r"memcpy|memset|copy_|_to_copy|aten::to\b|index_select|gather"),
    ("norms, RoPE, activations", r"norm|rotary|rope|silu|elementwise|reduce_kernel"),
)
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


def kind_of(name: str, kinds: Kinds) -> str:
    """The kind of work that a kernel or operator does, by its name."""
    found = (kind for kind, pattern in kinds if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def shares(events: Iterable[dict[str, Any]], kinds: Kinds) -> dict[str, float]:
    """Share of the traced time by kind, the largest first.

    Args:
        events: of a Chrome trace.
        kinds: to tell apart.

    Raises:
        AttnEditError: if the trace holds no work.
    """
    complete = [e for e in events if e.get("ph") == "X" and e.get("dur", 0) > 0]
    kernels = [e for e in complete if e.get("cat") in _DEVICE]
    seconds: dict[str, float] = {}
    if kernels:
        for event in kernels:
            kind = kind_of(event["name"], kinds)
            seconds[kind] = seconds.get(kind, 0.0) + event["dur"]
        begin = min(e["ts"] for e in kernels)
        end = max(e["ts"] + e["dur"] for e in kernels)
        seconds["idle"] = max(0.0, end - begin - _covered(kernels))
    else:
        for name, own in _own_times([e for e in complete if e.get("cat") == "cpu_op"]):
            kind = kind_of(name, kinds)
            seconds[kind] = seconds.get(kind, 0.0) + own
    total = sum(seconds.values())
    if not total:
        raise AttnEditError("profile", "no work in the trace", "profile later or for longer")
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {kind: value / total for kind, value in ordered}


def _covered(events: list[dict[str, Any]]) -> float:
    """Time in which at least one of them runs: streams overlap."""
    covered, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        end = event["ts"] + event["dur"]
        covered += max(0.0, end - max(reached, event["ts"]))
        reached = max(reached, end)
    return covered


def _own_times(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Each operator's time without that of the operators it calls."""
    result: list[list[Any]] = []
    open_: dict[Any, list[tuple[float, int]]] = {}
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        stack = open_.setdefault((event.get("pid"), event.get("tid")), [])
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        if stack:
            result[stack[-1][1]][1] -= event["dur"]
        stack.append((event["ts"] + event["dur"], len(result)))
        result.append([event["name"], event["dur"]])
    return [(name, max(0.0, own)) for name, own in result]


def read_trace_events(place: Path) -> list[dict[str, Any]]:
    """The events of a trace, or of the first rank's trace below a folder.

    Raises:
        AttnEditError: if there is none.
    """
    files = sorted(place.rglob("*.json.gz")) + sorted(place.rglob("*.json"))
    for path in [place] if place.is_file() else files:
        data = path.read_bytes()
        trace = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        events: list[dict[str, Any]] = trace.get("traceEvents", [])
        if any(event.get("cat") in {*_DEVICE, "cpu_op"} for event in events):
            return events
    raise AttnEditError("profile", place, "no trace was written; see the log")
