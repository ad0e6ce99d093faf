"""Cases of the element-wise operators: the fused cache write and the gate alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import controls
from benchmarks.kernels.contest import OURS, Case, Contest
from benchmarks.kernels.timing import Call, rotation
from benchmarks.kernels.window_cases import HEADS, KV_HEADS, PAGE, WIDTH, _normal, _pool
from vllm_attnedit.ops.kv_write import kv_write
from vllm_attnedit.ops.sigmoid_gate import sigmoid_gate

EPS = 1e-6


def write_contest(tokens: int, kept: int) -> Contest:
    """``tokens`` of a step, of which the last ``kept`` own memory."""
    read = tokens * (HEADS + KV_HEADS) * WIDTH + kept * KV_HEADS * WIDTH
    written = tokens * (HEADS + KV_HEADS) * WIDTH + 2 * kept * KV_HEADS * WIDTH
    traffic = 2 * (read + written)
    sets = rotation(traffic)
    pages = -(-tokens // PAGE)
    keys, values = _pool(sets * pages, PAGE, "nhd")
    positions = torch.randint(0, 8192, (tokens,), device="cuda")
    cos_sin = _normal(8192, WIDTH)
    weights = [_normal(WIDTH) for _ in "qk"]
    order = torch.randperm(sets * pages, device="cuda") + 1
    contest = Contest(traffic, 0, {OURS: []})
    for blocks in order.view(sets, pages):
        at = torch.arange(tokens, device="cuda")
        slots = blocks[at // PAGE] * PAGE + at % PAGE
        slots[: tokens - kept] = 0
        fresh = [_normal(tokens, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS)]
        out = [torch.empty_like(x) for x in fresh[:2]]

        def ours(fresh: Any = fresh, out: Any = out, slots: Tensor = slots) -> Tensor:
            kv_write(
                fresh[0],
                fresh[1],
                fresh[2],
                keys,
                values,
                slots,
                positions=positions,
                cos_sin_cache=cos_sin,
                q_weight=weights[0],
                k_weight=weights[1],
                eps=EPS,
                q_out=out[0],
                k_out=out[1],
            )
            result: Tensor = out[0]
            return result

        contest.calls[OURS].append(ours)
        try:
            call = _apart(fresh, keys, values, slots, positions, cos_sin, weights)
        except controls.Unavailable as error:
            contest.notes["norm, RoPE, write apart"] = str(error)
            continue
        contest.calls.setdefault("norm, RoPE, write apart", []).append(call)
    return contest


def _apart(
    fresh: list[Tensor],
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weights: list[Tensor],
) -> Call:
    """vLLM's kernels one after the other: two norms, one rotation in place, one write."""
    controls.available()
    from vllm import _custom_ops as vllm_ops

    q, k = (torch.empty_like(x) for x in fresh[:2])
    one = torch.ones(1, device="cuda")

    def call() -> Tensor:
        vllm_ops.rms_norm(q, fresh[0], weights[0], EPS)
        vllm_ops.rms_norm(k, fresh[1], weights[1], EPS)
        vllm_ops.rotary_embedding(positions, q.flatten(1), k.flatten(1), WIDTH, cos_sin, True)
        vllm_ops.reshape_and_cache_flash(k, fresh[2], keys, values, slots, "auto", one, one)
        return q

    return call


def gate_contest(tokens: int, elementwise: bool) -> Contest:
    """In place, as backends without a fused gate call it."""
    columns = HEADS * WIDTH if elementwise else HEADS
    traffic = 2 * tokens * (2 * HEADS * WIDTH + columns)
    contest = Contest(traffic, 0, {OURS: [], "torch": []})
    for _ in range(rotation(traffic)):
        attn, gate = _normal(tokens, HEADS, WIDTH), _normal(tokens, columns)
        out = torch.empty_like(attn)
        wide = gate.view(tokens, HEADS, -1)
        contest.calls[OURS].append(partial(sigmoid_gate, attn, gate, out))
        contest.calls["torch"].append(partial(_torch_gate, attn, wide, out))
    return contest


def _torch_gate(attn: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    return torch.mul(attn, gate.sigmoid(), out=out)


def _write(tokens: int, kept: int, quick: bool = False) -> Case:
    name = f"kv_write d{WIDTH} h{HEADS}/{KV_HEADS} B{tokens} page{PAGE} kept{kept}"
    return Case(name, lambda: write_contest(tokens, kept), quick)


def _gate(tokens: int, elementwise: bool, quick: bool = False) -> Case:
    kind = "elementwise" if elementwise else "headwise"
    name = f"sigmoid_gate d{WIDTH} h{HEADS} B{tokens} {kind}"
    return Case(name, lambda: gate_contest(tokens, elementwise), quick)


CASES = [
    _write(256, 256, quick=True),
    _write(8192, 8192),
    _write(8192, 128),
    _gate(256, False, quick=True),
    _gate(8192, False),
    _gate(8192, True),
]
