"""What a step with chunks reads of each request's past, against the definition of the window."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from vllm_attnedit.backends.steps import ChunkRequest, chunk_requests

lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=5)


@given(lengths, st.integers(1, 12))
def test_a_tail_is_what_the_first_new_token_sees(
    cached_and_new: list[tuple[int, int]], window: int
):
    ends = list(accumulate(new for _, new in cached_and_new))
    totals = [cached + new for cached, new in cached_and_new]
    requests = chunk_requests(ends, totals, window)
    assert [(r.computed, r.end - r.begin) for r in requests] == cached_and_new
    assert [r.end for r in requests] == ends
    for r in requests:
        seen = [key for key in range(r.computed) if r.computed - key < window]
        assert list(range(r.tail, r.computed)) == seen


def test_a_padding_request_has_no_past():
    assert chunk_requests([3, 8], [133, 1], 4) == [
        ChunkRequest(0, 3, tail=127, computed=130),
        ChunkRequest(3, 8, tail=0, computed=0),
    ]
