"""Steps cut down to the last tokens of each request."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_attnedit.backends.prompt_ends import cut, last_rows


def starts_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), keep=st.integers(1, 30))
def test_rows_are_the_last_of_each_request(lengths: list[int], keep: int) -> None:
    expected: list[int] = []
    begin = 0
    for length in lengths:
        expected += range(begin + max(0, length - keep), begin + length)
        begin += length
    found = last_rows(starts_of(lengths), keep)
    if len(expected) > 0.75 * begin:
        assert found is None
        return
    assert found is not None
    rows, starts = found
    assert rows.tolist() == expected
    assert starts.tolist() == starts_of([min(length, keep) for length in lengths]).tolist()
    assert (rows.dtype, starts.dtype) == (torch.int64, torch.int32)


def test_a_cut_request_begins_anew_and_others_keep_their_past() -> None:
    """A decode, a prompt's second chunk that is cut, a short chunk; two tokens of padding."""
    lengths, seq_lens, keep = [1, 20, 3], [50, 60, 9], 6
    query_start_loc = starts_of(lengths)
    common = CommonAttentionMetadata(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=3,
        num_actual_tokens=26,
        max_query_len=20,
        max_seq_len=60,
        block_table_tensor=torch.arange(12, dtype=torch.int32).view(3, 4),
        slot_mapping=torch.arange(100, 126),
        positions=torch.arange(200, 226),
        _seq_lens_cpu=torch.tensor(seq_lens, dtype=torch.int32),
    )
    found = last_rows(common.query_start_loc_cpu, keep)
    assert found is not None
    rows, starts = found
    assert rows.tolist() == [0, *range(15, 24)]
    part = cut(common, rows, starts, keep)
    assert part.query_start_loc.tolist() == part.query_start_loc_cpu.tolist() == [0, 1, 7, 10]
    assert part.seq_lens.tolist() == [50, 6, 9]
    assert part.seq_lens.dtype == torch.int32
    assert (part.num_actual_tokens, part.max_query_len, part.num_reqs) == (10, 6, 3)
    assert part.slot_mapping.tolist() == [100, *range(115, 124)]
    assert part.positions is not None
    assert part.positions.tolist() == [200, *range(215, 224)]
    assert part.block_table_tensor is common.block_table_tensor
    assert part.compute_num_computed_tokens().tolist() == [49, 0, 6]
    assert common.seq_lens.tolist() == seq_lens
