"""Shares of a trace whose events are made up."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trace import SERVING, TRAINING, kind_of, read_trace_events, shares
from vllm_attnedit.errors import AttnEditError


def event(name: str, start: float, duration: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "pid": 1, "tid": 1}


def test_shares_of_a_device() -> None:
    """100 us: 40 of GEMM, 30 of attention beside it for 10, 20 of copies, 20 of nothing."""
    trace = [
        event("nvjet_tst_128x64", 0, 40),
        event("_gateswa_decode_kernel", 30, 30),
        event("Memcpy DtoD", 60, 20, "gpu_memcpy"),
        event("sm90_xmma_gemm", 99, 1),
        event("aten::mm", 0, 1000, "cpu_op"),  # the host's side does not count
        {"ph": "M", "name": "process_name"},
    ]
    result = shares(trace, SERVING)
    assert next(iter(result)) == "GEMM"
    total = 41 + 30 + 20 + 19
    assert result == pytest.approx(
        {"GEMM": 41 / total, "attention": 30 / total, "copies": 20 / total, "idle": 19 / total}
    )
    assert sum(result.values()) == pytest.approx(1)


def test_a_kernel_within_another_hides_no_idleness() -> None:
    trace = [event("gemm", 0, 50), event("flash", 10, 5), event("gemm", 30, 30)]
    trace.append(event("gemm", 99, 1))
    assert shares(trace, SERVING)["idle"] == pytest.approx(39 / (50 + 5 + 30 + 1 + 39))


def test_operators_on_a_cpu_count_once() -> None:
    """What an operator calls is not its own time."""
    trace = [
        event("aten::linear", 0, 100, "cpu_op"),
        event("aten::addmm", 10, 80, "cpu_op"),
        event("aten::copy_", 20, 20, "cpu_op"),
        event("vllm::unified_attention_with_output", 100, 100, "cpu_op"),
    ]
    assert shares(trace, SERVING) == pytest.approx({"attention": 0.5, "GEMM": 0.4, "copies": 0.1})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fused_moe_kernel", "MoE"),
        ("void vllm::reshape_and_cache_flash_kernel", "KV writes"),
        ("flash_fwd_splitkv_kernel", "attention"),
        ("void cutlass::device_kernel<gemm>", "GEMM"),
        ("_C::onednn_mm", "GEMM"),
        ("triton_red_fused_rms_norm_3", "norms, RoPE, activations"),
        ("vllm::act_and_mul_kernel<silu>", "norms, RoPE, activations"),
        ("argmax_reduce", "sampling"),
        ("something_else", "other"),
    ],
)
def test_kinds_of_serving(name: str, kind: str) -> None:
    assert kind_of(name, SERVING) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        (
            "triton_red_fused__log_softmax__to_copy_argmax_exp_mul_sub_sum_0",
            "loss over the vocabulary",
        ),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT", "GEMM"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser, clipping"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("triton_poi_fused_mul_silu_3", "norms, RoPE, activations"),
        ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_0", "norms, RoPE, activations"),
        ("triton_per_fused__varlen_attn_backward_sigmoid_1", "norms, RoPE, activations"),
        ("void at::native::reduce_kernel<128, 4>", "norms, RoPE, activations"),
        ("something_else", "other"),
    ],
)
def test_kinds_of_training(name: str, kind: str) -> None:
    assert kind_of(name, TRAINING) == kind


def test_one_file_is_a_place_too(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps({"traceEvents": [event("gemm", 0, 1)]}))
    (tmp_path / "a.json").write_text(json.dumps({"traceEvents": [event("flash", 0, 1)]}))
    (only,) = read_trace_events(tmp_path / "b.json")
    assert only["name"] == "gemm"


def test_traces_are_found_and_their_lack_is_said(tmp_path: Path) -> None:
    with pytest.raises(AttnEditError, match="no trace"):
        read_trace_events(tmp_path)
    with gzip.open(tmp_path / "rank0.pt.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [event("gemm", 0, 1)]}, file)
    assert len(read_trace_events(tmp_path)) == 1
    with pytest.raises(AttnEditError, match="no work"):
        shares([], SERVING)
