"""Absorbed latent attention over a paged latent cache on CPU: dense tiles, the host's kernels.

Stretches of keys of similar length, of one request or of several, are gathered into one dense tile
that stays in the CPU's cache, and all heads attend to it at once: as query rows of torch's fused
attention, or by two matrix products with scores that are rounded to the query's dtype between them.
Stretches of one request are merged by their softmax sums. No loop runs over tokens, heads or pages.

Shapes: T tokens, N heads, C kv_lora_rank, P qk_rope_head_dim, L elements of a cache entry,
G stretches of a group, Q query tokens each, S keys.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from vllm_attnedit.ops.mla_decode.cpu_groups import Group, Stretch, groups

#: Bytes of a tile: it is written once and read twice.
TILE_BYTES = 6 * 2**20


@lru_cache
def fused_is_faster(dtype: torch.dtype) -> bool:
    """Whether torch's fused attention takes less time here than two products and a softmax.

    On processors with AMX it does (`benchmarks/results/mla_decode_cpu_amx.json`), on those with
    AVX-512 alone it does not, the gathering included (`mla_decode_cpu.json`).
    """
    amx = torch.cpu.get_capabilities().get("amx_bf16", False)
    return bool(amx) and dtype in (torch.float32, torch.bfloat16)


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    out: Tensor,
    kv_scale: Tensor | None = None,
    factors: int = 0,
    workspace: Tensor | None = None,
) -> Tensor:
    """As :func:`vllm_attnedit.ops.mla_decode.mla_decode`, without a gate; any widths and pages.

    Args:
        q_latent: ``(T, N, C)``.
        q_rope: ``(T, N, P)``.
        kv_cache: ``(num_blocks, block_size, L)`` contiguous; latent, RoPE key, and ``factors``
            elements that hold float32 factors of each head.
        block_table: ``(R, max_blocks)``.
        seq_lens: ``(R,)``.
        query_start_loc: ``(R + 1,)``.
        scale: factor of the scores.
        out: ``(T, N, C)``.
        kv_scale: factor of an FP8 cache.
        factors: see ``kv_cache``.
        workspace: bytes to gather into, reused from call to call: new memory costs more than the
            gathering. Too small or none takes new memory.
    """
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    query_lens = [last - first for first, last in pairwise(starts)]
    page, width = kv_cache.shape[1:]
    rank = q_latent.shape[2]
    query = torch.cat([q_latent, q_rope], dim=-1)  # (T, N, C + P)
    merged: tuple[Tensor, Tensor, Tensor] | None = None
    most = max(page, TILE_BYTES // (width * kv_cache.element_size()))
    for group in groups(query_lens, lengths, page, most):
        requests = torch.tensor([s.request for s in group.stretches])
        first_row = torch.tensor([starts[s.request] for s in group.stretches])
        rows = (first_row[:, None] + torch.arange(group.query_len)).flatten()  # (G * Q,)
        tile = _gather(kv_cache, block_table[requests], group.stretches, workspace)
        if tile.dtype != query.dtype:
            tile = tile.to(query.dtype)
            tile = tile if kv_scale is None else tile.mul_(kv_scale)
        grouped = query[rows].view(len(requests), -1, query.shape[2])  # (G, Q * N, C + P)
        hidden = _hidden(group, lengths, tile.shape[1])
        if factors or not fused_is_faster(query.dtype):
            attended, lse = _by_products(grouped, tile, hidden, group, scale, factors)
        else:
            attended, lse = _by_fused(grouped, tile, hidden, group, scale)
        attended = attended[..., :rank].view(-1, *out.shape[1:])
        if lse is None:
            out[rows] = attended
            continue
        if merged is None:
            merged = _nothing(out)
        _merge(merged, rows, attended, lse.view(-1, out.shape[1]))
    if merged is not None:
        total, summed, seen = merged
        split = seen[:, 0].isfinite()
        out[split] = (total[split] / summed[split][..., None]).to(out.dtype)
    return out


def _gather(
    cache: Tensor, blocks: Tensor, stretches: list[Stretch], workspace: Tensor | None
) -> Tensor:
    """The entries of each stretch, (G, S, L) in whole pages; zeros past its end."""
    page, width = cache.shape[1:]
    first = torch.tensor([s.start // page for s in stretches])
    lengths = torch.tensor([s.stop - s.start for s in stretches])
    pages = -(-int(lengths[0]) // page)
    number = torch.arange(pages)
    used = number < -(-lengths // page)[:, None]
    columns = torch.where(used, first[:, None] + number, 0)
    index = torch.where(used, blocks.gather(1, columns), 0).flatten()
    flat = cache.view(torch.uint8).flatten(1)  # bytes: FP8 is not indexed everywhere
    nbytes = index.numel() * flat.shape[1]
    if workspace is None or workspace.numel() < nbytes:
        workspace = torch.empty(nbytes, dtype=torch.uint8)
    gathered = workspace[:nbytes].view(index.numel(), -1)
    torch.index_select(flat, 0, index, out=gathered)
    tile = gathered.view(cache.dtype).view(len(stretches), pages * page, width)
    # What lies there has no weight, but a NaN would outlive a weight of zero.
    past = torch.arange(pages * page) >= lengths[:, None]
    if bool(past.any()):
        gathered.view(-1, width * cache.element_size())[past.flatten()] = 0
    return tile


def _hidden(group: Group, lengths: list[int], keys: int) -> Tensor | None:
    """(G, Q, S): keys that come after each query; ``None`` if none does."""
    left = torch.tensor([lengths[s.request] - s.start for s in group.stretches])
    stop = torch.tensor([s.stop - s.start for s in group.stretches])
    seen = left[:, None] - torch.arange(group.query_len - 1, -1, -1)  # (G, Q), from the start on
    hidden = torch.arange(keys) >= torch.minimum(seen, stop[:, None])[..., None]
    return hidden if bool(hidden.any()) else None


def _by_products(
    grouped: Tensor, tile: Tensor, hidden: Tensor | None, group: Group, scale: float, factors: int
) -> tuple[Tensor, Tensor | None]:
    """Queries (G, Q * N, C + P) to a tile (G, S, L): (G, Q * N, L), of which the first C count, and
    G * Q * N logarithms of the softmax sums, which whole stretches do not need.
    """
    keys = tile[..., : grouped.shape[2]].transpose(1, 2)
    scores = torch.baddbmm(grouped.new_empty(1), grouped, keys, beta=0, alpha=scale)
    scores = scores.unflatten(1, (group.query_len, -1))  # (G, Q, N, S)
    if factors:
        by_head = tile[..., tile.shape[2] - factors :].view(torch.float32).transpose(1, 2)
        scores = scores * by_head[:, None]
    if hidden is not None:
        # Finite: a stretch may lie wholly after a query, and gets its weight when merged.
        scores.masked_fill_(hidden[:, :, None], torch.finfo(scores.dtype).min)
    if group.whole:
        weights, lse = scores.softmax(-1).to(grouped.dtype), None
    else:
        wide = scores.softmax(-1, dtype=torch.float32)
        # The greatest weight is exp(greatest score) over the sum.
        lse = scores.amax(-1).float() - wide.amax(-1).log()
        weights = wide.to(grouped.dtype)
    # Whole entries: a product with a part of each would copy it first.
    return torch.bmm(weights.flatten(1, 2), tile), lse


def _by_fused(
    grouped: Tensor, tile: Tensor, hidden: Tensor | None, group: Group, scale: float
) -> tuple[Tensor, Tensor | None]:
    """As :func:`_by_products`, without factors. What torch's public function dispatches to, which
    keeps the logarithms to itself."""
    mask = None
    if hidden is not None:
        mask = grouped.new_zeros(()).masked_fill(hidden, torch.finfo(grouped.dtype).min)
        if group.query_len > 1:
            mask = mask.repeat_interleave(grouped.shape[1] // group.query_len, dim=1)
        mask = mask[:, None]  # (G, 1, 1 or Q * N, S)
    entries = tile[:, None]
    attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        grouped[:, None], entries, entries, attn_mask=mask, scale=scale
    )
    return attended[:, 0], None if group.whole else lse


def _nothing(out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighed outputs (T, N, C), their weights (T, N) and the greatest logarithm yet (T, N)."""
    total = out.new_zeros(out.shape, dtype=torch.float32)
    summed = out.new_zeros(out.shape[:2], dtype=torch.float32)
    return total, summed, torch.full_like(summed, -torch.inf)


def _merge(
    merged: tuple[Tensor, Tensor, Tensor], rows: Tensor, attended: Tensor, lse: Tensor
) -> None:
    """Add what stretches attended to, (G * Q, N, C) with logarithms of sums (G * Q, N)."""
    total, summed, greatest = merged
    # No row comes twice: only a request's last stretch leaves room in a group.
    before = greatest[rows]
    highest = torch.maximum(before, lse)
    decay, weight = (before - highest).exp_(), (lse - highest).exp_()
    greatest[rows] = highest
    summed[rows] = summed[rows] * decay + weight
    total[rows] = total[rows] * decay[..., None] + attended * weight[..., None]
