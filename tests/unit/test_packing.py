"""Which window layers share pages, and what is refused or left unpacked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_attnedit import AttnEditError
from vllm_attnedit.accounting import pack_size
from vllm_attnedit.config import FULL, SLIDING
from vllm_attnedit.layers import packing
from vllm_attnedit.layers.packing import PAGES_OPTION, Pack, find_pack


def settings(
    option: str | None = "packed",
    stages: int = 1,
    skip_layers: tuple[str, ...] = (),
    sharing: bool = False,
) -> SimpleNamespace:
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            kv_sharing_fast_prefill=sharing, kv_cache_dtype_skip_layers=list(skip_layers)
        ),
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


@pytest.mark.parametrize("option", [None, "auto"])
def test_packed_by_default_on_cuda_alone(option: str | None, monkeypatch: pytest.MonkeyPatch):
    assert find_pack(settings(option), every(4, 8), 0) is None
    platform = SimpleNamespace(is_cuda=lambda: True, device_type="cuda")
    monkeypatch.setattr(packing, "current_platform", platform)
    assert find_pack(settings(option), every(4, 8), 0) == Pack(holder=0, slot=0, size=3)
    assert find_pack(settings("separate"), every(4, 8), 0) is None


def test_only_who_asked_is_told_that_layers_do_not_pack(monkeypatch: pytest.MonkeyPatch):
    platform = SimpleNamespace(is_cuda=lambda: True, device_type="cuda")
    monkeypatch.setattr(packing, "current_platform", platform)
    said: list[str] = []
    monkeypatch.setattr(packing.logger, "warning_once", lambda text, *args: said.append(text))
    assert find_pack(settings(None), every(2, 8), 0) is None
    assert not said
    assert find_pack(settings("packed"), every(2, 8), 0) is None
    assert said == ["Window pages are not packed: %s."]


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"sharing": True}, "kv-sharing-fast-prefill"), ({"skip_layers": ("1",)}, "two data types")],
)
def test_what_vllm_would_misread_is_not_packed(changes, why, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(
        packing.logger, "warning_once", lambda text, *args: said.append(text % args)
    )
    assert find_pack(settings("packed", **changes), every(4, 8), 0) is None
    assert why in said[0]


def test_an_unknown_option_is_refused():
    with pytest.raises(AttnEditError, match=f"{PAGES_OPTION}: tight: use auto, separate or packed"):
        find_pack(settings("tight"), every(4, 8), 0)
