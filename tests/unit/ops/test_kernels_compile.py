"""Kernels compiled for a Hopper GPU, without one: to machine code, with the launches of the tables.

The interpreter runs what a kernel means; this finds what the compiler refuses, and the one kernel
that the interpreter does not take.
"""

from __future__ import annotations

from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from vllm_attnedit.ops.combine import _combine_kernel
from vllm_attnedit.ops.gateswa_decode.config import decode_config, hopper_config
from vllm_attnedit.ops.gateswa_decode.hopper_kernel import hopper_kernel
from vllm_attnedit.ops.gateswa_decode.kernel import decode_kernel
from vllm_attnedit.ops.gateswa_prefill.kernel import prefill_kernel
from vllm_attnedit.ops.gateswa_prefill.triton import prefill_config
from vllm_attnedit.ops.kv_write.kernel import write_kernel
from vllm_attnedit.ops.mla_decode.config import latent_config
from vllm_attnedit.ops.mla_decode.kernel import latent_kernel
from vllm_attnedit.ops.mla_prefill.kernel import expanded_kernel
from vllm_attnedit.ops.mla_prefill.triton import expanded_config

HOPPER = GPUTarget("cuda", 90, 32)
#: Shared memory that a program of a Hopper GPU may have.
SHARED_LIMIT = 227 * 1024

POINTERS = {
    "block_table_ptr": "*i32",
    "seq_lens_ptr": "*i32",
    "query_start_ptr": "*i32",
    "key_start_ptr": "*i32",
    "partial_ptr": "*fp32",
    "partial_lse_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "k_scale_ptr": "*fp32",
    "v_scale_ptr": "*fp32",
    "kv_scale_ptr": "*fp32",
    "key_scale_ptr": "*fp32",
    "slot_ptr": "*i64",
    "position_ptr": "*i64",
}
WINDOW = {
    **{f"STRIDE_{x}_BLOCK": 16 * 8 * 128 for x in "KV"},
    **{f"STRIDE_{x}_TOKEN": 8 * 128 for x in "KV"},
    **{f"STRIDE_{x}_HEAD": 128 for x in "KV"},
    "KV_HEADS": 8,
    "GROUP": 4,
    "WIDTH": 128,
    "PADDED": 128,
    "PAGE": 16,
    "GATE": 2,
}


def compiled(kernel: Any, constants: dict[str, Any], *, warps: int, registers: Any = None) -> Any:
    """The kernel for bfloat16 data; arguments are 16-byte aligned unless they count something."""
    names = kernel.arg_names
    dtypes = {}
    for name in names:
        if name in constants:
            dtypes[name] = "constexpr"
        elif name.endswith("_ptr"):
            dtypes[name] = POINTERS.get(name, "*bf16")
        else:
            dtypes[name] = "fp32" if name in ("scale", "eps") else "i32"
    aligned = [i for i, name in enumerate(names) if name.startswith("stride") or "_ptr" in name]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel,
        signature=dtypes,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "maxnreg": registers}
    return triton.compile(source, target=HOPPER, options=options)


def check(kernel: Any, constants: dict[str, Any], **launch: Any) -> None:
    binary = compiled(kernel, constants, **launch)
    assert binary.metadata.shared <= SHARED_LIMIT
    assert len(binary.asm["cubin"]) > 1000


@pytest.mark.parametrize(("window", "batch"), [(128, 256), (128, 4), (4096, 4)])
def test_gateswa_decode(window, batch):
    config = decode_config(
        group=4,
        max_query_len=1,
        width=128,
        itemsize=2,
        window=window,
        num_requests=batch,
        num_kv_heads=8,
        multiprocessors=132,
    )
    launch = {
        "ROWS": config.rows,
        "TILE": config.tile,
        "SPLITS": config.splits,
        "QUERY_TILES": 1,
        "STAGES": config.stages,
        "ALIGNED": False,
    }
    check(decode_kernel, {**WINDOW, **launch}, warps=config.warps)


@pytest.mark.parametrize("window", [40, 128, 1024])
@pytest.mark.parametrize("max_query_len", [1, 4])
def test_gateswa_decode_hopper(window, max_query_len):
    config = hopper_config(
        group=4, max_query_len=max_query_len, width=128, window=window, page=16, quantised=False
    )
    assert config is not None
    launch = {
        "ROWS": config.rows,
        "TILE": config.tile,
        "SINGLE": config.single,
        "ONE_QUERY": max_query_len == 1,
        "WARPS": config.warps,
        "k_scale_ptr": None,
        "v_scale_ptr": None,
    }
    check(hopper_kernel, {**WINDOW, **launch}, warps=config.warps)


@pytest.mark.parametrize("window", [128, 512])
def test_gateswa_prefill(window):
    config = prefill_config(group=4, width=128, itemsize=2, window=window)
    launch = {"ROWS": config.rows, "TILE": config.tile, "STAGES": config.stages}
    check(prefill_kernel, {**WINDOW, **launch}, warps=config.warps, registers=config.registers)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("batch", [1, 64])
def test_mla_decode(batch, normed):
    config = latent_config(
        num_heads=32,
        max_query_len=1,
        max_seq_len=8192,
        width=512,
        itemsize=2,
        page=64,
        num_requests=batch,
        multiprocessors=132,
    )
    launch = {
        "STRIDE_BLOCK": 64 * 576,
        "STRIDE_TOKEN": 576,
        "STRIDE_SCALE_BLOCK": 64 * 320,
        "STRIDE_SCALE_TOKEN": 320,
        "HEADS": 32,
        "RANK": 512,
        "PADDED_RANK": 512,
        "ROPE": 64,
        "PADDED_ROPE": 64,
        "PAGE": 64,
        "GATE": 1,
        "ROWS": config.rows,
        "TILE": config.tile,
        "SPLITS": config.splits,
        "QUERY_TILES": 1,
        "STAGES": config.stages,
        "ALIGNED": config.aligned,
        **({} if normed else {"key_scale_ptr": None}),
    }
    check(latent_kernel, launch, warps=config.warps)


@pytest.mark.parametrize("normed", [False, True])
def test_mla_prefill(normed):
    config = expanded_config(width=128, itemsize=2)
    launch = {
        "HEADS": 32,
        **dict.fromkeys(("NOPE", "PADDED_NOPE", "VALUE", "PADDED_VALUE"), 128),
        "ROPE": 64,
        "PADDED_ROPE": 64,
        "CAUSAL": True,
        "GATE": 1,
        "ROWS": config.rows,
        "TILE": config.tile,
        "STAGES": config.stages,
        **({} if normed else {"key_scale_ptr": None}),
    }
    check(expanded_kernel, launch, warps=config.warps)


def test_kv_write():
    strides = {name: value for name, value in WINDOW.items() if name.startswith("STRIDE")}
    launch = {
        "Q_HEADS": 32,
        "KV_HEADS": 8,
        "WIDTH": 128,
        "PADDED": 128,
        "ROTARY": 128,
        "HALF": 64,
        "TAIL": 1,
        "NEOX": True,
        "PAGE": 16,
        "FIRST_SLOT": 16,
        "STORE_K": True,
        "H": 16,
    }
    check(write_kernel, {**strides, **launch}, warps=4)


def test_combine():
    launch = {"HEADS": 32, "WIDTH": 128, "GATE": 1, "SPLITS": 16, "STEP": 8, "BLOCK": 128}
    check(_combine_kernel, launch, warps=1)
