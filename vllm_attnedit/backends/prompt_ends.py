"""A step cut down to the last tokens of each request: what layers see that need no others.

Shapes: T tokens, R requests, M tokens that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

_WORTH = 0.75
"""Share of a step's tokens up to which leaving out the others is worth the copies."""


def last_rows(query_start_loc: Tensor, keep: int) -> tuple[Tensor, Tensor] | None:
    """The rows of each request's last ``keep`` tokens, or ``None`` if that leaves out too few.

    Args:
        query_start_loc: ``(R + 1,)`` int32 on the host.
        keep: tokens of a request that are left, if it has as many.

    Returns:
        rows ``(M,)`` int64, and where each request's begin among them, ``(R + 1,)`` int32.
    """
    ends = query_start_loc[1:]
    kept = (ends - query_start_loc[:-1]).clamp(max=keep)
    starts = torch.zeros_like(query_start_loc)
    torch.cumsum(kept, 0, out=starts[1:])
    left = int(starts[-1])
    if left > _WORTH * int(query_start_loc[-1]):
        return None
    shift = torch.repeat_interleave((ends - starts[1:]).long(), kept.long())
    return torch.arange(left) + shift, starts


def cut(
    common: CommonAttentionMetadata, rows: Tensor, starts: Tensor, keep: int
) -> CommonAttentionMetadata:
    """The same step without the tokens that are left out, as if their requests began after them.

    What a request's first tokens that are left would see of those left out they do not see: who
    cuts keeps as many more as that spoils.

    Args:
        common: of the whole step.
        rows: ``(M,)`` int64 on its device, as :func:`last_rows` says.
        starts: ``(R + 1,)`` int32 on the host, likewise.
        keep: as for :func:`last_rows`.
    """
    on_device = starts.to(common.query_start_loc.device, non_blocking=True)
    had = common.query_start_loc[1:] - common.query_start_loc[:-1]
    new = on_device[1:] - on_device[:-1]
    lengths = torch.where(had > keep, new, common.seq_lens)
    return common.replace(
        query_start_loc=on_device,
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(common.seq_lens.dtype),
        num_actual_tokens=len(rows),
        max_query_len=min(common.max_query_len, keep),
        slot_mapping=common.slot_mapping[rows],
        positions=None if common.positions is None else common.positions[rows],
        seq_lens_cpu_upper_bound=None,
        _seq_lens_cpu=None,
        _num_computed_tokens_cpu=None,
        _num_computed_tokens_cache=None,
    )
