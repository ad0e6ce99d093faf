"""Cases of the window operators, with Qwen3-8B's heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import controls
from benchmarks.kernels.contest import OURS, Case, Contest
from benchmarks.kernels.timing import Call, rotation
from vllm_attnedit.ops.gateswa_decode import gateswa_decode
from vllm_attnedit.ops.gateswa_prefill import gateswa_prefill

HEADS, KV_HEADS, WIDTH = 32, 8, 128
SCALE = WIDTH**-0.5
PAGE = 16


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def _ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _pool(pages: int, page: int, layout: str) -> tuple[Tensor, Tensor]:
    """Key and value caches as views of vLLM's ``(num_blocks, 2, ...)`` pool, block 0 its null."""
    if layout == "hnd":
        pool = _normal(pages + 1, 2, KV_HEADS, page, WIDTH)
        return pool[:, 0].transpose(1, 2), pool[:, 1].transpose(1, 2)
    pool = _normal(pages + 1, 2, page, KV_HEADS, WIDTH)
    return pool[:, 0], pool[:, 1]


def _tables(sets: int, batch: int, first: int, last: int, page: int) -> list[Tensor]:
    """Tables whose pages ``first`` to ``last`` are scattered over the pool, the rest null."""
    held = last - first
    order = torch.randperm(sets * batch * held, device="cuda").int() + 1
    tables = []
    for pages in order.view(sets, batch, held):
        table = torch.zeros(batch, last, dtype=torch.int32, device="cuda")
        table[:, first:] = pages
        tables.append(table)
    return tables


def decode_contest(
    batch: int,
    length: int,
    window: int,
    *,
    gate: str | None = "headwise",
    layout: str = "nhd",
    fp8: bool = False,
    page: int = PAGE,
) -> Contest:
    """One token a request, all of one length."""
    live = min(window, length)
    itemsize = 1 if fp8 else 2
    gate_columns = {None: 0, "headwise": HEADS, "elementwise": HEADS * WIDTH}[gate]
    traffic = (
        2 * batch * live * KV_HEADS * WIDTH * itemsize
        + 2 * batch * HEADS * WIDTH * 2
        + batch * gate_columns * 2
    )
    sets = rotation(traffic)
    first, last = (length - live) // page, -(-length // page)
    keys, values = _pool(sets * batch * (last - first), page, layout)
    if fp8:
        keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    seq_lens, starts = _ints([length] * batch), _ints(range(batch + 1))
    contest = Contest(traffic, 4 * batch * live * HEADS * WIDTH, {OURS: []})
    for table in _tables(sets, batch, first, last, page):
        q = _normal(batch, HEADS, WIDTH)
        logits = _normal(batch, gate_columns) if gate else None
        paged = (q, keys, values, table, seq_lens, starts)
        out = torch.empty_like(q)

        def ours(paged: Any = paged, logits: Any = logits, out: Tensor = out) -> Tensor:
            return gateswa_decode(*paged, sliding_window=window, scale=SCALE, gate=logits, out=out)

        contest.calls[OURS].append(ours)
        if not fp8:
            _add_paged_controls(contest, paged, logits, window, 1, length)
    return contest


def _add_paged_controls(
    contest: Contest,
    paged: tuple[Tensor, ...],
    gate: Tensor | None,
    window: int,
    max_query_len: int,
    max_seq_len: int,
) -> None:
    options: dict[str, Any] = {
        "window": window,
        "max_query_len": max_query_len,
        "max_seq_len": max_seq_len,
        "scale": SCALE,
    }
    suffix = " + gate" if gate is not None else ""
    for name, make in (
        ("FA3", lambda: controls.fa3_window(*paged, **options, scheduled=False)),
        ("FA3 scheduled", lambda: controls.fa3_window(*paged, **options, scheduled=True)),
        ("vLLM Triton", lambda: controls.triton_window(*paged, **options)),
    ):
        _add(contest, name + suffix, make, gate)


def _add(contest: Contest, name: str, make: Any, gate: Tensor | None) -> None:
    try:
        call: Call = controls.gated(make(), gate)
    except controls.Unavailable as error:
        contest.notes[name] = str(error)
        return
    contest.calls.setdefault(name, []).append(call)


def prefill_contest(chunks: int, tokens: int, cached: int, window: int, gate: str) -> Contest:
    """``chunks`` requests that bring ``tokens`` each, after ``cached`` tokens."""
    total = chunks * tokens
    columns = HEADS if gate == "headwise" else HEADS * WIDTH
    tail = min(window - 1, cached)
    traffic = 2 * (
        total * (2 * HEADS + 2 * KV_HEADS) * WIDTH
        + total * columns
        + 2 * chunks * tail * KV_HEADS * WIDTH
    )
    seen = sum(min(window, cached + i + 1) for i in range(tokens))
    contest = Contest(traffic, 4 * chunks * seen * HEADS * WIDTH, {OURS: []})
    sets = rotation(traffic)
    length = cached + tokens
    first, last = max(0, cached - window + 1) // PAGE, -(-length // PAGE)
    keys, values = _pool(sets * chunks * (last - first), PAGE, "nhd")
    seq_lens = _ints([length] * chunks)
    starts = _ints(range(0, total + 1, tokens))
    for table in _tables(sets, chunks, first, last, PAGE):
        q, k, v = _normal(total, HEADS, WIDTH), *(_normal(total, KV_HEADS, WIDTH) for _ in "kv")
        logits = _normal(total, columns)
        out = torch.empty_like(q)
        # Controls read the chunk from its pages, where vLLM has written it by then.
        for request in range(chunks):
            position = torch.arange(cached, length, device="cuda")
            block, slot = table[request, position // PAGE].long(), position % PAGE
            rows = slice(request * tokens, (request + 1) * tokens)
            keys[block, slot], values[block, slot] = k[rows], v[rows]
        paged = (keys, values, table, seq_lens, starts)

        def ours(
            dense: Any = (q, k, v), paged: Any = paged, logits: Any = logits, out: Tensor = out
        ) -> Tensor:
            return gateswa_prefill(
                *dense, *paged, sliding_window=window, scale=SCALE, gate=logits, out=out
            )

        contest.calls[OURS].append(ours)
        _add_paged_controls(contest, (q, *paged), logits, window, tokens, length)
        if cached == 0:
            dense = (q, k, v, starts)
            _add(
                contest,
                "FA3 dense + gate",
                lambda dense=dense: controls.fa3_dense(
                    *dense, window=window, max_len=tokens, scale=SCALE
                ),
                logits,
            )
    return contest


def _decode(batch: int, length: int, window: int, *, quick: bool = False, **more: Any) -> Case:
    shown = more.get("gate", "headwise") or "nogate"
    extra = " hnd" if more.get("layout") == "hnd" else ""
    extra += " fp8" if more.get("fp8") else ""
    page = more.get("page", PAGE)
    name = f"gateswa_decode d{WIDTH} h{HEADS}/{KV_HEADS} B{batch} L{length} W{window}"
    return Case(
        f"{name} page{page} {shown}{extra}",
        lambda: decode_contest(batch, length, window, **more),
        quick,
    )


def _prefill(chunks: int, tokens: int, cached: int, window: int, gate: str, quick: bool) -> Case:
    name = f"gateswa_prefill d{WIDTH} h{HEADS}/{KV_HEADS} B{chunks} L{cached}+{tokens} W{window}"
    return Case(
        f"{name} page{PAGE} {gate}",
        lambda: prefill_contest(chunks, tokens, cached, window, gate),
        quick,
    )


CASES = [
    *(_decode(batch, 8192, 128, quick=batch == 256) for batch in (16, 64, 256, 512)),
    _decode(64, 8192, 512),
    _decode(256, 8192, 128, gate=None),
    _decode(256, 8192, 128, gate="elementwise"),
    _decode(256, 8192, 128, layout="hnd"),
    _decode(256, 8192, 128, page=64),
    _decode(256, 8192, 128, fp8=True),
    *(_decode(batch, length, 128) for batch in (64, 256) for length in (1024, 131_072)),
    _decode(4, 8192, 4096),
    _prefill(1, 8192, 0, 128, "headwise", True),
    _prefill(1, 8192, 0, 512, "headwise", False),
    _prefill(1, 8192, 0, 128, "elementwise", False),
    _prefill(4, 2048, 6144, 128, "headwise", False),
    # Last: FA3 was seen to fault at large batches and windows, which ends the process.
    _decode(256, 8192, 1024),
]
