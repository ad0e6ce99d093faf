"""Which keys of which requests are computed at once on CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


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
