"""Absorbed latent attention over a paged latent cache on CPU: two matrix products a group.

Stretches of keys of similar length, of one request or of several, are gathered into one dense tile
that stays in the CPU's cache, and all heads attend to it at once; stretches of one request are
merged by their softmax sums. No loop runs over tokens, heads or pages. Scores are rounded to the
query's dtype between the products, which are the host library's.

Shapes: T tokens, N heads, C kv_lora_rank, P qk_rope_head_dim, L elements of a cache entry,
G stretches of a group, Q query tokens each, S keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

#: Bytes of a tile: it is written once and read by both products.
TILE_BYTES = 6 * 2**20


@dataclass(frozen=True)
class Stretch:
    """Keys of one request that attend together; pages are whole but for the last."""

    request: int
    start: int
    stop: int


@dataclass(frozen=True)
class Group:
    """Stretches that are computed at once, the longest first."""

    stretches: list[Stretch]
    query_len: int
    whole: bool  # each is its request's only one


def groups(query_lens: list[int], seq_lens: list[int], page: int, most: int) -> Iterator[Group]:
    """All keys of all requests that have queries; those of one query length and similar length
    together.

    Args:
        query_lens: query tokens of each request.
        seq_lens: tokens of each request.
        page: block size.
        most: keys of a group, padding included; at least a page.
    """
    step = most // page * page
    stretches = [
        Stretch(r, start, min(start + step, seq_lens[r]))
        for r, query in enumerate(query_lens)
        if query
        for start in range(0, seq_lens[r], step)
    ]

    def kind(s: Stretch) -> tuple[int, bool]:
        return query_lens[s.request], seq_lens[s.request] <= step

    stretches.sort(key=lambda s: (kind(s), s.start - s.stop))
    chosen: list[Stretch] = []
    for stretch in stretches:
        if chosen:
            longest = -(-(chosen[0].stop - chosen[0].start) // page) * page
            if kind(chosen[0]) != kind(stretch) or (len(chosen) + 1) * longest > step:
                yield Group(chosen, *kind(chosen[0]))
                chosen = []
        chosen.append(stretch)
    if chosen:
        yield Group(chosen, *kind(chosen[0]))


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
        keys = tile[..., : width - factors].transpose(1, 2)
        scores = torch.baddbmm(grouped.new_empty(1), grouped, keys, beta=0, alpha=scale)
        scores = scores.unflatten(1, (group.query_len, -1))  # (G, Q, N, S)
        if factors:
            by_head = tile[..., width - factors :].view(torch.float32).transpose(1, 2)
            scores = scores * by_head[:, None]
        _hide(scores, group, lengths)
        if group.whole:
            weights = scores.softmax(-1).to(query.dtype)
        else:
            wide = scores.softmax(-1, dtype=torch.float32)
            # The greatest weight is exp(greatest score) over the sum.
            lse = scores.amax(-1).float() - wide.amax(-1).log()  # (G, Q, N)
            weights = wide.to(query.dtype)
        # Whole entries: a product with a part of each would copy it first.
        attended = torch.bmm(weights.flatten(1, 2), tile)[..., :rank].view(-1, *out.shape[1:])
        if group.whole:
            out[rows] = attended
            continue
        if merged is None:
            merged = _nothing(out)
        _merge(merged, rows, attended, lse.flatten(0, 1))
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


def _hide(scores: Tensor, group: Group, lengths: list[int]) -> None:
    """Take from (G, Q, N, S) the keys that come after each query, in place."""
    tokens, keys = scores.shape[1], scores.shape[3]
    left = torch.tensor([lengths[s.request] - s.start for s in group.stretches])
    stop = torch.tensor([s.stop - s.start for s in group.stretches])
    seen = left[:, None] - torch.arange(tokens - 1, -1, -1)  # (G, Q), of keys from the start on
    hidden = torch.arange(keys) >= torch.minimum(seen, stop[:, None])[..., None]  # (G, Q, S)
    if bool(hidden.any()):
        # Finite: a stretch may lie wholly after a query, and gets its weight when merged.
        low = torch.finfo(scores.dtype).min
        scores.masked_fill_(hidden[:, :, None], low)


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
