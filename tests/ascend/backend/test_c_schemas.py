"""Rung c: every call of an NPU operator against its real schema and meta kernel, on fake tensors.

They claim to lie on the CPU: slicing one that claims an NPU asks torch_npu for the device. Schemas
and meta kernels are the same, and the CPU kernels of these tests are not run.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.config import set_current_vllm_config
from vllm_ascend.attention.attention_v1 import AscendAttentionState as State

from tests.ascend.backend.serving import engine_config
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.backends.gateswa_ascend import Chunk, GateSWAAscendImpl, GateSWAAscendMetadata

HEADS, KV_HEADS, WIDTH, BLOCK, BLOCKS, WINDOW = 32, 8, 128, 128, 20, 512


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A fake tensor, inside a fake mode."""
    return torch.empty(*shape, dtype=dtype)


def step(state: State, chunk: Chunk | None, ends: list[int], lengths: list[int]) -> Any:
    """Metadata of one step."""
    return GateSWAAscendMetadata(
        attn_mask=empty(2048, 2048, dtype=torch.int8),
        attn_state=state,
        num_actual_tokens=ends[-1],
        seq_lens_list=lengths,
        actual_seq_lengths_q=ends,
        block_tables=empty(len(ends), 8, dtype=torch.int32),
        slot_mapping=empty(ends[-1], dtype=torch.int32),
        causal=True,
        model_runner_type="generate",
        chunk=chunk,
    )


@pytest.fixture
def impl(tmp_path, monkeypatch):
    """The implementation of one window layer of a model of Qwen3-8B's shape."""
    from vllm_ascend.attention import attention_v1

    monkeypatch.setattr(attention_v1, "_EXTRA_CTX", SimpleNamespace(capturing=False))
    model = tiny_edited("qwen3", tiny_edit("gateswa"))
    config = engine_config(tiny_edited_checkpoint(model, tmp_path), dtype="bfloat16")
    with set_current_vllm_config(config):
        yield GateSWAAscendImpl(
            HEADS, WIDTH, 0.1, KV_HEADS, None, WINDOW, "auto", None, "decoder", None
        )


@pytest.mark.parametrize("kind", ["first chunks", "chunks with tails", "stock chunks", "decodes"])
@pytest.mark.parametrize("gate", [None, HEADS, HEADS * WIDTH])
def test_gateswa_calls(impl, kind, gate):
    with FakeTensorMode():
        ends, lengths = ([1, 2, 3], [130, 5, 200]) if kind == "decodes" else ([3, 7], [3, 500])
        tokens = ends[-1]
        tails = empty(496, dtype=torch.int64)
        metadata = {
            "first chunks": lambda: step(
                State.PrefillNoCache, Chunk(tails[:0], None, ends), ends, ends
            ),
            "chunks with tails": lambda: step(
                State.ChunkedPrefill,
                Chunk(tails, empty(503, dtype=torch.int64), [3, 503]),
                ends,
                lengths,
            ),
            "stock chunks": lambda: step(State.ChunkedPrefill, None, ends, lengths),
            "decodes": lambda: step(State.DecodeOnly, None, ends, lengths),
        }[kind]()
        cache = tuple(empty(BLOCKS, BLOCK, KV_HEADS, WIDTH) for _ in range(2))
        output = empty(tokens, HEADS, WIDTH)
        result = impl.forward(
            SimpleNamespace(layer_name="layers.0.attn", _k_scale_float=1.0, _v_scale_float=1.0),
            output.new_empty(output.shape),
            *(empty(tokens, KV_HEADS, WIDTH) for _ in range(2)),
            cache,
            metadata,
            output,
            output_scale=None if gate is None else empty(tokens, gate),
        )
    assert result.shape == (tokens, HEADS, WIDTH) and result.dtype == torch.bfloat16


def test_a_wrong_call_is_refused():
    """The schema is the real one: an argument of the other version of the operator fails."""
    with FakeTensorMode(), pytest.raises((TypeError, RuntimeError)):
        torch_npu.npu_fused_infer_attention_score(
            empty(4, HEADS, WIDTH),
            empty(4, KV_HEADS, WIDTH),
            empty(4, KV_HEADS, WIDTH),
            num_query_heads=HEADS,
            input_layout="TND",
        )


PAGED: dict[str, Any] = {"num_query_heads": HEADS, "num_key_value_heads": 1, "block_size": BLOCK}
TOKENS, RANK, ROPE = 7, 512, 64


def latent_prefill() -> Any:
    """vllm-ascend's call for a prompt's expanded latents."""
    return torch_npu.npu_fused_infer_attention_score(
        *(empty(TOKENS, HEADS, WIDTH) for _ in range(3)),
        query_rope=empty(TOKENS, HEADS, ROPE),
        key_rope=empty(TOKENS, HEADS, ROPE),
        num_heads=HEADS,
        num_key_value_heads=HEADS,
        input_layout="TND",
        sparse_mode=3,
        atten_mask=empty(2048, 2048, dtype=torch.int8),
        scale=0.1,
        softmax_lse_flag=True,
        actual_seq_lengths=[3, 7],
        actual_seq_lengths_kv=[3, 7],
    )


def latent_decode() -> Any:
    """vllm-ascend's call for one token of each request on pages of latents."""
    pages = empty(BLOCKS, 1, BLOCK, RANK)
    return torch_npu.npu_fused_infer_attention_score_v2(
        empty(3, HEADS, 1, RANK),
        pages,
        pages,
        query_rope=empty(3, HEADS, 1, ROPE),
        key_rope=empty(BLOCKS, 1, BLOCK, ROPE),
        input_layout="BNSD_NBSD",
        sparse_mode=0,
        softmax_scale=0.1,
        block_table=empty(3, 4, dtype=torch.int32),
        actual_seq_kvlen=[130, 5, 200],
        **PAGED,
    )


def latent_write() -> Any:
    """Norm, rotation and write of latents."""
    return torch_npu.npu_kv_rmsnorm_rope_cache(
        empty(TOKENS, 1, 1, RANK + ROPE),
        empty(RANK),
        empty(TOKENS, 1, 1, ROPE),
        empty(TOKENS, 1, 1, ROPE),
        empty(TOKENS, dtype=torch.int64),
        empty(BLOCKS, BLOCK, 1, ROPE),
        empty(BLOCKS, BLOCK, 1, RANK),
        epsilon=1e-6,
        cache_mode="PA",
        is_output_kv=True,
    )


def latent_rotation() -> Any:
    """Rotation of queries."""
    cos, sin = (empty(TOKENS, 1, 1, ROPE) for _ in range(2))
    return torch_npu.npu_interleave_rope(empty(TOKENS, HEADS, 1, ROPE), cos, sin)


@pytest.mark.parametrize(
    ("call", "shape"),
    [
        (latent_prefill, (TOKENS, HEADS, WIDTH)),
        (latent_decode, (HEADS, 3, 1, RANK)),
        (latent_write, (BLOCKS, BLOCK, 1, ROPE)),
        (latent_rotation, (TOKENS, HEADS, 1, ROPE)),
    ],
)
def test_mla_calls(call, shape):
    with FakeTensorMode():
        result = call()
    first = result[0] if isinstance(result, tuple) else result
    assert tuple(first.shape) == shape and first.dtype == torch.bfloat16
