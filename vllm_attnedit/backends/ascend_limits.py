"""What the fused attention operator of Ascend NPUs takes, checked when a model is loaded.

The operator checks nothing that a user could read: it fails at the first step, with a number. The
limits are those of ``npu_fused_infer_attention_score`` with the TND layout in CANN 9.1 and of its
``_v2`` for MLA decode, as vllm-ascend 0.23 calls them. Pure Python: runs and is tested anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vllm_attnedit.errors import AttnEditError

NOT_RUN = (
    "Edited attention on Ascend is compile- and contract-verified, not run on hardware: first run "
    "attnedit doctor --device npu and scripts/smoke_ascend.sh, see docs/ascend.md"
)
"""What the log says when a model is loaded there."""

FIA = "npu_fused_infer_attention_score"
FIA_V2 = "npu_fused_infer_attention_score_v2"

BLOCK_SIZE = 128
"""vllm-ascend's pages, and the only size that its backend names."""

MAX_REQUESTS = 4096
MAX_HEADS, MAX_GROUP = 256, 64
MAX_TOKENS = 2**20
"""Of a step with chunks: T of the TND layout."""

DTYPES = ("bfloat16", "float16")
MAX_MLA_HEADS = 128
"""vllm-ascend pads the heads of a rank to a power of two, and the operator ends here."""

MLA_LATENT, MLA_ROPE, MLA_NOPE = 512, 64, 128


def _require(condition: bool, field: str, value: object, operator: str, limit: str) -> None:
    if not condition:
        raise AttnEditError(field, value, f"{operator} on Ascend takes {limit}")


def _check_step(
    operator: str, *, dtype: str, block_size: int, max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    _require(dtype in DTYPES, "--dtype", dtype, operator, "bfloat16 or float16")
    _require(block_size == BLOCK_SIZE, "--block-size", block_size, operator, "blocks of 128 tokens")
    _require(
        max_num_seqs <= MAX_REQUESTS,
        "--max-num-seqs",
        max_num_seqs,
        operator,
        f"up to {MAX_REQUESTS} requests a step",
    )
    _require(
        max_num_batched_tokens <= MAX_TOKENS,
        "--max-num-batched-tokens",
        max_num_batched_tokens,
        operator,
        f"up to {MAX_TOKENS} tokens a step",
    )


def check_gate(gate: str | None, additional_config: Mapping[str, Any] | None) -> None:
    """Refuse a gate where vllm-ascend gives each rank a share of the tokens (FlashComm).

    It gathers them again before layers that it knows by name, and the gate's is none of those.

    Args:
        gate: of the edit.
        additional_config: vLLM's ``--additional-config``.

    Raises:
        AttnEditError: naming the option or the variable that asks for it.
    """
    if gate is None:
        return
    option, variable = "enable_flashcomm1", "VLLM_ASCEND_ENABLE_FLASHCOMM1"
    asked = (additional_config or {}).get(option)
    if asked:
        field = f"--additional-config {option}"
        raise AttnEditError(field, asked, "leave it out: the gate needs all tokens on every rank")
    value = os.environ.get(variable, "0")
    if asked is None and value not in ("", "0"):
        raise AttnEditError(variable, value, "unset it: the gate needs all tokens on every rank")


def check_window_attention(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sliding_window: int,
    dtype: str,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> None:
    """Limits of a GateSWA layer, full or windowed.

    Args:
        num_heads: query heads of a rank.
        num_kv_heads: KV heads of a rank.
        head_dim: width of queries, keys and values.
        sliding_window: keys a token sees, its own included.
        dtype: of the activations, ``bfloat16`` for example.
        block_size: tokens a page.
        max_num_seqs: requests a step, at most.
        max_num_batched_tokens: tokens a step, at most.

    Raises:
        AttnEditError: naming the field, its value, the operator and the limit.
    """
    _check_step(
        FIA,
        dtype=dtype,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    multi_head = num_heads == num_kv_heads
    _require(
        head_dim == 128 or (head_dim == 64 and multi_head),
        "head_dim",
        head_dim,
        FIA,
        "heads of 128, or of 64 where every query head has its own KV head",
    )
    _require(
        num_heads <= MAX_HEADS,
        "num_attention_heads per rank",
        num_heads,
        FIA,
        f"up to {MAX_HEADS} heads: raise --tensor-parallel-size",
    )
    _require(
        num_heads % num_kv_heads == 0 and num_heads // num_kv_heads <= MAX_GROUP,
        "num_key_value_heads per rank",
        f"{num_heads} query heads on {num_kv_heads}",
        FIA,
        f"whole groups of up to {MAX_GROUP} query heads a KV head",
    )
    _require(
        1 <= sliding_window < 2**31,
        "sliding_window",
        sliding_window,
        FIA,
        "windows of 1 to 2**31 - 1 keys",
    )


def check_latent_attention(
    *,
    num_heads: int,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    dtype: str,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> None:
    """Limits of an MLA layer; arguments as in :func:`check_window_attention`.

    Raises:
        AttnEditError: naming the field, its value, the operator and the limit.
    """
    _check_step(
        FIA_V2,
        dtype=dtype,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    _require(
        1 <= num_heads <= MAX_MLA_HEADS,
        "num_attention_heads per rank",
        num_heads,
        FIA_V2,
        f"up to {MAX_MLA_HEADS} heads: raise --tensor-parallel-size",
    )
    for field, value, wanted in (
        ("kv_lora_rank", kv_lora_rank, MLA_LATENT),
        ("qk_rope_head_dim", qk_rope_head_dim, MLA_ROPE),
        ("qk_nope_head_dim", qk_nope_head_dim, MLA_NOPE),
        ("v_head_dim", v_head_dim, MLA_NOPE),
    ):
        _require(value == wanted, f"attention_edit.{field}", value, FIA_V2, f"{wanted} only")
