"""The kernels as an Ascend would launch them, and a bound on what lowering makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_attnedit.ops.gateswa_decode.kernel import decode_kernel
from vllm_attnedit.ops.kv_write.kernel import write_kernel
from vllm_attnedit.ops.mla_decode.kernel import latent_kernel
from vllm_attnedit.ops.sigmoid_gate.ascend import TILE, gate_rows_kernel
from vllm_attnedit.ops.sigmoid_gate.triton import BLOCK, _gate_kernel

PAGE, WIDTH = 128, 128
POINTERS = {
    "block_table_ptr": "*i32",
    "seq_lens_ptr": "*i32",
    "query_start_ptr": "*i32",
    "partial_ptr": "*fp32",
    "partial_lse_ptr": "*fp32",
    "slot_ptr": "*i32",
    "position_ptr": "*i64",
}
#: Rows of a tile that cannot be one contiguous copy cost a scalar access each, not more.
MAX_SCALAR_ACCESSES = 16


@dataclass(frozen=True)
class KernelCase:
    """One kernel with one set of constants."""

    kernel: Any
    constants: dict[str, Any]

    def __post_init__(self) -> None:
        # Strides of parts that a case does not use.
        for name in self.kernel.arg_names:
            if name.isupper() and name not in self.constants:
                self.constants[name] = 0

    def __str__(self) -> str:
        telling = ("HEADS", "Q_HEADS", "KV_HEADS", "GROUP", "HEADWISE", "GATE", "ROWS", "TILE")
        values = (f"{name}={self.constants[name]}" for name in telling if name in self.constants)
        return " ".join((self.kernel.fn.__name__.strip("_"), *values))


def gate_case(heads: int, *, headwise: bool, block: int = BLOCK) -> KernelCase:
    """The gate on heads that lie end to end."""
    return KernelCase(
        _gate_kernel,
        {
            "ATTN_HEAD": WIDTH,
            "OUT_HEAD": WIDTH,
            "HEADS": heads,
            "WIDTH": WIDTH,
            "HEADWISE": headwise,
            "BLOCK": block,
        },
    )


def gate_rows_case(*, headwise: bool, rows: int = TILE // WIDTH) -> KernelCase:
    """The gate as an NPU runs it."""
    return KernelCase(gate_rows_kernel, {"WIDTH": WIDTH, "HEADWISE": headwise, "ROWS": rows})


def page_strides(kv_heads: int) -> dict[str, int]:
    """Of keys and values in vllm-ascend's pages, ``(blocks, 128, K, D)`` each."""
    by_axis = {"BLOCK": PAGE * kv_heads * WIDTH, "TOKEN": kv_heads * WIDTH, "HEAD": WIDTH}
    return {f"STRIDE_{x}_{axis}": stride for x in "KV" for axis, stride in by_axis.items()}


def window_case(kv_heads: int, group: int, *, gate: int, tile: int) -> KernelCase:
    """Window decode, a tile to a page's part: one scalar read of the block table."""
    return KernelCase(
        decode_kernel,
        {
            **page_strides(kv_heads),
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "WIDTH": WIDTH,
            "PADDED": WIDTH,
            "PAGE": PAGE,
            "GATE": gate,
            "ROWS": 16,
            "TILE": tile,
            "SPLITS": 1,
            "QUERY_TILES": 1,
            "STAGES": 1,
            "ALIGNED": True,
            "k_scale_ptr": None,
            "v_scale_ptr": None,
        },
    )


def latent_case(heads: int, *, gate: int, rows: int = 16, tile: int = 32) -> KernelCase:
    """Latent decode."""
    rank, rope = 512, 64
    return KernelCase(
        latent_kernel,
        {
            "STRIDE_BLOCK": PAGE * (rank + rope),
            "STRIDE_TOKEN": rank + rope,
            "HEADS": heads,
            "RANK": rank,
            "PADDED_RANK": rank,
            "ROPE": rope,
            "PADDED_ROPE": rope,
            "PAGE": PAGE,
            "GATE": gate,
            "ROWS": rows,
            "TILE": tile,
            "SPLITS": 1,
            "QUERY_TILES": -(-heads // rows),
            "STAGES": 1,
            "ALIGNED": True,
            "kv_scale_ptr": None,
            "key_scale_ptr": None,
        },
    )


def write_case(heads: int, kv_heads: int, *, store_k: bool) -> KernelCase:
    """QK-norm, RoPE and the write of pages."""
    return KernelCase(
        write_kernel,
        {
            **page_strides(kv_heads),
            "Q_HEADS": heads,
            "KV_HEADS": kv_heads,
            "WIDTH": WIDTH,
            "PADDED": WIDTH,
            "ROTARY": WIDTH,
            "HALF": WIDTH // 2,
            "TAIL": 1,
            "NEOX": True,
            "PAGE": PAGE,
            "FIRST_SLOT": PAGE,
            "STORE_K": store_k,
            "H": 16,
            "k_scale_ptr": None,
            "v_scale_ptr": None,
        },
    )
