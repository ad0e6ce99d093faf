"""Which window layers share pages, and what is refused or left unpacked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_attnedit import AttnEditError
from vllm_attnedit.config import FULL, SLIDING
from vllm_attnedit.layers.packing import PAGES_OPTION, Pack, find_pack, pack_size


def settings(option: str | None = "packed", stages: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        additional_config=None if option is None else {PAGES_OPTION: option},
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
    )


def every(full_every: int, layers: int) -> tuple[str, ...]:
    return tuple(FULL if (i + 1) % full_every == 0 else SLIDING for i in range(layers))


@pytest.mark.parametrize(("layers", "full_every"), [(36, 6), (48, 6), (30, 6), (4, 4), (9, 3)])
def test_every_window_layer_has_a_place_of_its_own(layers: int, full_every: int):
    types = every(full_every, layers)
    packs = {i: find_pack(settings(), types, i) for i, t in enumerate(types) if t == SLIDING}
    places, holders = set(), set()
    for i, pack in packs.items():
        assert pack is not None and pack.size == full_every - 1
        assert 0 <= pack.slot < pack.size
        assert pack.holder <= i and types[pack.holder] == SLIDING
        assert (pack.slot == 0) == (pack.holder == i)
        places.add((pack.holder, pack.slot))
        holders.add(pack.holder)
    assert len(places) == len(packs)
    assert len(holders) == types.count(FULL)


def test_layers_need_not_alternate_evenly():
    types = (SLIDING, SLIDING, SLIDING, FULL, SLIDING, FULL)
    assert find_pack(settings(), types, 2) == Pack(holder=2, slot=0, size=2)
    assert find_pack(settings(), types, 4) == Pack(holder=2, slot=1, size=2)


@pytest.mark.parametrize(
    ("types", "stages", "reason"),
    [
        (every(4, 8), 2, "pipeline"),
        ((SLIDING, SLIDING, SLIDING, FULL, FULL), 1, "3 window layers do not divide over 2"),
        ((SLIDING, SLIDING), 1, "do not divide over 0"),
        (every(2, 8), 1, "one window layer for each"),
    ],
)
def test_what_stays_unpacked(types: tuple[str, ...], stages: int, reason: str):
    found = pack_size(types, stages)
    assert isinstance(found, str) and reason in found
    assert find_pack(settings(stages=stages), types, 0) is None


def test_off_by_default():
    assert find_pack(settings(None), every(4, 8), 0) is None


def test_an_unknown_option_is_refused():
    with pytest.raises(AttnEditError, match=f"{PAGES_OPTION}: tight: use separate or packed"):
        find_pack(settings("tight"), every(4, 8), 0)
