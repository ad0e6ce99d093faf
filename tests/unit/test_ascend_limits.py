"""The limits of Ascend's fused attention, each met and each passed by one."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_attnedit.backends.ascend_limits import (
    FIA,
    FIA_V2,
    check_gate,
    check_latent_attention,
    check_window_attention,
)
from vllm_attnedit.errors import AttnEditError

STEP: dict[str, Any] = {
    "dtype": "bfloat16",
    "block_size": 128,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
}
WINDOW: dict[str, Any] = STEP | {
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "sliding_window": 128,
}
LATENT: dict[str, Any] = STEP | {
    "num_heads": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float16"},
        {"head_dim": 64, "num_heads": 8},
        {"max_num_seqs": 4096},
        {"max_num_batched_tokens": 2**20},
        {"num_heads": 256, "num_kv_heads": 4},
        {"sliding_window": 1},
    ],
)
def test_windows_within_the_limits(changes: dict[str, Any]) -> None:
    check_window_attention(**(WINDOW | changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dtype": "float32"}, "--dtype"),
        ({"block_size": 64}, "--block-size"),
        ({"max_num_seqs": 4097}, "--max-num-seqs"),
        ({"max_num_batched_tokens": 2**20 + 1}, "--max-num-batched-tokens"),
        ({"head_dim": 96}, "head_dim"),
        ({"head_dim": 64}, "head_dim"),
        ({"num_heads": 257, "num_kv_heads": 257}, "num_attention_heads per rank"),
        ({"num_heads": 65, "num_kv_heads": 1}, "num_key_value_heads per rank"),
        ({"num_heads": 30}, "num_key_value_heads per rank"),
        ({"sliding_window": 2**31}, "sliding_window"),
    ],
)
def test_windows_beyond_them(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(AttnEditError) as caught:
        check_window_attention(**(WINDOW | changes))
    assert caught.value.field == field
    assert FIA in str(caught.value) and "Ascend" in str(caught.value)


@pytest.mark.parametrize("heads", [1, 20, 128])
def test_latents_within_the_limits(heads: int) -> None:
    check_latent_attention(**(LATENT | {"num_heads": heads}))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dtype": "float32"}, "--dtype"),
        ({"num_heads": 129}, "num_attention_heads per rank"),
        ({"kv_lora_rank": 256}, "attention_edit.kv_lora_rank"),
        ({"qk_rope_head_dim": 32}, "attention_edit.qk_rope_head_dim"),
        ({"qk_nope_head_dim": 64}, "attention_edit.qk_nope_head_dim"),
        ({"v_head_dim": 64}, "attention_edit.v_head_dim"),
    ],
)
def test_latents_beyond_them(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(AttnEditError) as caught:
        check_latent_attention(**(LATENT | changes))
    assert caught.value.field == field
    assert FIA_V2 in str(caught.value)


FLASHCOMM = "VLLM_ASCEND_ENABLE_FLASHCOMM1"


def test_a_gate_and_shares_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FLASHCOMM, raising=False)
    check_gate("headwise", None)
    check_gate(None, {"enable_flashcomm1": True})
    with pytest.raises(AttnEditError, match="enable_flashcomm1: True: leave it out"):
        check_gate("headwise", {"enable_flashcomm1": True})
    monkeypatch.setenv(FLASHCOMM, "1")
    check_gate("headwise", {"enable_flashcomm1": False})
    with pytest.raises(AttnEditError, match=f"{FLASHCOMM}: 1: unset it"):
        check_gate("headwise", {})
