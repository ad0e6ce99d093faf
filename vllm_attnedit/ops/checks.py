"""Checks that run before a launch: a kernel given a shape it does not take reads foreign memory.

Only shapes, strides, dtypes and devices are looked at, never values: a check must not wait for the
device, nor break the capture of a CUDA graph.

Shapes: T tokens, R requests, N query heads, K KV heads, D head width, B block size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vllm_attnedit.errors import AttnEditError

QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

#: Widest head that a kernel's tile of keys and values still fits on chip for.
MAX_HEAD_DIM = 256
#: Blocks of 16 tokens and multiples, as vLLM hands them out.
BLOCK_MULTIPLE = 16


def require(condition: bool, field: str, value: object, fix: str) -> None:
    """Raise :class:`AttnEditError` unless ``condition``."""
    if not condition:
        raise AttnEditError(field, value, fix)


@functools.cache
def _has_bfloat16(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) >= (8, 0)


def check_query(q: Tensor, *, field: str = "q") -> None:
    """``q`` is ``(T, N, width)`` of a dtype that kernels compute in, elements adjacent.

    float64 passes on a CPU, where the oracle runs.
    """
    require(q.dim() == 3, f"{field}.shape", tuple(q.shape), "pass (tokens, heads, width)")
    allowed = QUERY_DTYPES if q.is_cuda else (*QUERY_DTYPES, torch.float64)
    require(q.dtype in allowed, f"{field}.dtype", q.dtype, "use bfloat16, float16 or float32")
    check_adjacent(q, field)
    if q.is_cuda and q.dtype == torch.bfloat16:
        require(
            _has_bfloat16(q.device.index),
            f"{field}.dtype",
            f"{q.dtype} on {torch.cuda.get_device_name(q.device)}",
            "use float16: this GPU has no bfloat16 arithmetic",
        )


def check_adjacent(x: Tensor, field: str) -> None:
    """The last axis has stride 1; all others may have any."""
    require(
        x.stride(-1) == 1 or x.shape[-1] == 1,
        f"{field}.stride",
        tuple(x.stride()),
        "make the last axis contiguous",
    )


def check_like(x: Tensor, shape: tuple[int, ...], reference: Tensor, field: str) -> None:
    """``x`` has this shape, and the dtype and device of ``reference``."""
    require(tuple(x.shape) == shape, f"{field}.shape", tuple(x.shape), f"pass {shape}")
    require(x.dtype == reference.dtype, f"{field}.dtype", x.dtype, f"use {reference.dtype}")
    check_device(x, reference, field)
    check_adjacent(x, field)


def check_device(x: Tensor, reference: Tensor, field: str) -> None:
    """``x`` lives where ``reference`` does."""
    require(
        x.device == reference.device, f"{field}.device", x.device, f"move to {reference.device}"
    )


def check_head_dim(width: int, field: str) -> None:
    """A multiple of 16 up to :data:`MAX_HEAD_DIM`."""
    require(
        width % 16 == 0 and 16 <= width <= MAX_HEAD_DIM,
        field,
        width,
        f"use a multiple of 16 from 16 to {MAX_HEAD_DIM}",
    )


def check_window(sliding_window: int) -> None:
    """At least the query token itself."""
    require(
        isinstance(sliding_window, int) and 1 <= sliding_window < 2**30,
        "sliding_window",
        sliding_window,
        "use a window of at least 1 key, the query's own",
    )


def check_paged_cache(key_cache: Tensor, value_cache: Tensor, q: Tensor, num_kv_heads: int) -> None:
    """Both caches are ``(num_blocks, B, K, D)``: views with any block, token and head strides."""
    for field, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        require(
            cache.dim() == 4,
            f"{field}.shape",
            tuple(cache.shape),
            "pass (num_blocks, block_size, num_kv_heads, head_dim)",
        )
        check_device(cache, q, field)
        check_adjacent(cache, field)
        require(
            cache.dtype == q.dtype or cache.dtype in FP8_DTYPES,
            f"{field}.dtype",
            cache.dtype,
            f"use {q.dtype}, float8_e4m3fn or float8_e5m2",
        )
    expected = (*key_cache.shape[:2], num_kv_heads, q.shape[2])
    for field, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        require(
            tuple(cache.shape) == expected, f"{field}.shape", tuple(cache.shape), f"pass {expected}"
        )
    require(
        key_cache.dtype == value_cache.dtype,
        "value_cache.dtype",
        value_cache.dtype,
        f"use {key_cache.dtype}, as key_cache",
    )
    check_block_size(key_cache.shape[1], "key_cache.shape[1]")


def check_block_size(block_size: int, field: str) -> None:
    """A multiple of 16 tokens."""
    require(
        block_size >= BLOCK_MULTIPLE and block_size % BLOCK_MULTIPLE == 0,
        field,
        block_size,
        f"use blocks of a multiple of {BLOCK_MULTIPLE} tokens",
    )


def check_groups(num_heads: int, num_kv_heads: int, field: str) -> None:
    """Query heads share KV heads evenly."""
    require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        field,
        f"{num_heads} query heads on {num_kv_heads} KV heads",
        "make the first a multiple of the second",
    )


def check_batch(
    block_table: Tensor | None, seq_lens: Tensor | None, query_start_loc: Tensor, q: Tensor
) -> None:
    """int32 metadata of R requests: ``(R, max_blocks)``, ``(R,)`` and ``(R + 1,)``."""
    require(
        query_start_loc.dim() == 1 and query_start_loc.shape[0] >= 1,
        "query_start_loc.shape",
        tuple(query_start_loc.shape),
        "pass (requests + 1,)",
    )
    requests = query_start_loc.shape[0] - 1
    named = {"query_start_loc": query_start_loc}
    if seq_lens is not None:
        named["seq_lens"] = seq_lens
        require(
            tuple(seq_lens.shape) == (requests,),
            "seq_lens.shape",
            tuple(seq_lens.shape),
            f"pass ({requests},), one length for each request of query_start_loc",
        )
    if block_table is not None:
        named["block_table"] = block_table
        require(
            block_table.dim() == 2 and block_table.shape[0] == requests,
            "block_table.shape",
            tuple(block_table.shape),
            f"pass ({requests}, max_blocks)",
        )
    for field, x in named.items():
        require(x.dtype == torch.int32, f"{field}.dtype", x.dtype, "use int32")
        check_adjacent(x, field)
        check_device(x, q, field)


def check_gate(gate: Tensor | None, q: Tensor, value_dim: int, *, elementwise: bool = True) -> None:
    """None, head-wise ``(T, N)`` or element-wise ``(T, N * value_dim)`` logits."""
    if gate is None:
        return
    tokens, heads = q.shape[:2]
    shapes = [(tokens, heads)] + ([(tokens, heads * value_dim)] if elementwise else [])
    require(
        tuple(gate.shape) in shapes,
        "gate.shape",
        tuple(gate.shape),
        "pass " + " or ".join(str(shape) for shape in shapes),
    )
    require(gate.is_floating_point(), "gate.dtype", gate.dtype, "pass floating-point logits")
    check_device(gate, q, "gate")
    check_adjacent(gate, "gate")


def check_scale(scale: Tensor | None, cache: Tensor, field: str) -> None:
    """None, or one float32 on the cache's device."""
    if scale is None:
        return
    require(scale.numel() == 1, f"{field}.shape", tuple(scale.shape), "pass one element")
    require(scale.dtype == torch.float32, f"{field}.dtype", scale.dtype, "use float32")
    check_device(scale, cache, field)


def prepare_out(out: Tensor | None, shape: tuple[int, ...], q: Tensor) -> Tensor:
    """``out`` checked, or a new tensor of ``shape`` like ``q``."""
    if out is None:
        return q.new_empty(shape)
    check_like(out, shape, q, "out")
    return out
