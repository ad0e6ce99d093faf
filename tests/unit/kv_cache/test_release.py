"""Between which numbers of computed tokens a request has nothing to return."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from vllm_attnedit.kv_cache.release import ReleasingWindowManager


def manager_of(window: int, block: int, pack: int, drafts: int) -> ReleasingWindowManager:
    """What the arithmetic reads, without a pool."""
    manager = object.__new__(ReleasingWindowManager)
    manager.sliding_window, manager.block_size = window, block
    manager.num_speculative_tokens = drafts
    manager.tails = SimpleNamespace(alignment=block * pack)  # type: ignore[assignment]
    return manager


@given(
    window=st.integers(1, 70),
    block=st.sampled_from([1, 4, 16]),
    pack=st.integers(1, 5),
    drafts=st.integers(0, 3),
    computed=st.integers(0, 400),
)
def test_nothing_changes_between_the_settled_numbers_and_something_does_outside(
    window: int, block: int, pack: int, drafts: int, computed: int
):
    manager = manager_of(window, block, pack, drafts)

    def state(total: int) -> tuple[int, int]:
        """The first block that is needed, and where the next turn would resume."""
        tokens = max(0, total - drafts)
        return manager._first_needed_block(total), tokens // (block * pack)

    low, high = manager._settled_around(max(0, computed - drafts))
    assert low <= computed < high
    assert {state(total) for total in range(low, high)} == {state(computed)}
    assert state(high) != state(computed)
    assert low == 0 or state(low - 1) != state(computed)
