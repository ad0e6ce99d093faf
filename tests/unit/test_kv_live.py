"""The report of a running server's KV memory: what is made of recorded and of made-up metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.smollm2 import SMOLLM2, config_of
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.kv_live import build_live_report
from vllm_attnedit.kv_server import ServerState, WindowGroup, parse_state

RECORDED = Path(__file__).parent / "recorded"
A_BLOCK = 5 * 128 * 2 * 3 * 64 * 2
"""Bytes: five layers of 128 tokens of two times three heads of 64, in 16 bits."""


def recorded(name: str) -> ServerState:
    state = parse_state((RECORDED / f"metrics_{name}.txt").read_text())
    assert state is not None
    return state


def state_of(**fields: Any) -> ServerState:
    defaults: dict[str, Any] = {
        "num_blocks": 10_000,
        "blocks_in_use": 0,
        "block_size": 16,
        "cache_dtype": "auto",
        "running": 0,
        "waiting": 0,
        "preemptions": 0,
    }
    return ServerState(**{**defaults, **fields})


def test_measured_groups() -> None:
    """12 requests of about 860 tokens each, all past their window."""
    state = recorded("measured")
    assert (state.running, state.num_blocks, state.block_size) == (12, 2183, 128)
    assert [group.heads for group in state.window_groups] == [3] * 5
    report = build_live_report(config_of(), state)
    full, windows = report["groups"]
    assert report["split"] == "measured"
    assert (full["groups"], windows["groups"]) == (1, 5)
    assert windows["blocks"] == [120, 120]
    assert full["blocks"] == [state.blocks_in_use - 120] * 2
    assert windows["formula_blocks"] == 5 * 12 * 2
    assert report["bytes_in_use"] == state.blocks_in_use * A_BLOCK
    assert report["teacher_bytes"] == [6 * full["bytes"][0]] * 2
    saved = 1 - report["bytes_in_use"] / (6 * full["bytes"][0])
    assert report["reduction"] == pytest.approx([saved, saved])
    assert report["formula_reduction"] == pytest.approx(saved, abs=0.05)


def test_derived_groups() -> None:
    state = recorded("derived")
    assert state.running == 12
    assert not state.window_groups
    report = build_live_report(config_of(), state)
    full, windows = report["groups"]
    assert report["split"] == "derived"
    assert full["blocks"][0] + windows["blocks"][1] == state.blocks_in_use
    assert full["blocks"][1] + windows["blocks"][0] == state.blocks_in_use
    assert windows["blocks"][1] <= 5 * 12 * 3


@given(lengths=st.lists(st.integers(1, 3000), max_size=20), offset=st.integers(0, 1))
def test_the_derived_interval_holds_the_truth(lengths: list[int], offset: int) -> None:
    """Against a count of what requests of these lengths hold, decoding or in a chunk."""
    block, window = 16, 128
    held = []
    for tokens in lengths:
        whole = -(-tokens // block)
        left_behind = max(0, tokens - window + 1) // block
        held.append((whole, min(whole, whole - left_behind + offset)))
    in_full, in_window = (sum(count) for count in zip(*held, strict=True)) if held else (0, 0)
    state = state_of(blocks_in_use=in_full + 5 * in_window, running=len(lengths))
    full, windows = build_live_report(config_of(), state, pages="separate")["groups"]
    assert full["blocks"][0] <= in_full <= full["blocks"][1]
    assert windows["blocks"][0] <= 5 * in_window <= windows["blocks"][1]


def test_long_requests_leave_little_doubt() -> None:
    """At 32K tokens the derived share saved is known to one part in a hundred."""
    for pages, blocks in (("separate", 2048 + 5 * 9), ("packed", 410 + 9)):
        state = state_of(blocks_in_use=64 * blocks, running=64)
        report = build_live_report(config_of(), state, pages=pages)
        low, high = report["reduction"]
        assert low <= report["formula_reduction"] <= high
        assert high - low < 0.01


@given(lengths=st.lists(st.integers(1, 3000), max_size=20), offset=st.integers(0, 1))
def test_the_derived_interval_of_packed_pages_holds_the_truth(
    lengths: list[int], offset: int
) -> None:
    """A full block holds five window blocks' tokens, and there is one window group."""
    in_full = sum(-(-tokens // 80) for tokens in lengths)
    in_window = 0
    for tokens in lengths:
        whole = -(-tokens // 16)
        in_window += min(whole, whole - max(0, tokens - 127) // 16 + offset)
    state = state_of(blocks_in_use=in_full + in_window, running=len(lengths))
    report = build_live_report(config_of(), state)
    full, windows = report["groups"]
    assert report["pages"] == "packed"
    assert full["blocks"][0] <= in_full <= full["blocks"][1]
    assert windows["blocks"][0] <= in_window <= windows["blocks"][1]


@pytest.mark.parametrize(("factor", "pages"), [(1.0, "separate"), (5.0, "packed")])
def test_the_pool_tells_the_pages(factor: float, pages: str) -> None:
    """A block of five layers' 16 tokens, or of five full layers' 80."""
    state = state_of(bytes_per_block=1.0004 * factor * A_BLOCK / 8)
    assert build_live_report(config_of(), state)["pages"] == pages
    assert build_live_report(config_of(), state, pages="separate")["pages"] == "separate"


def test_where_layers_do_not_divide_pages_are_separate() -> None:
    config = config_of(num_hidden_layers=29)
    for pages in ("auto", "separate", "packed"):
        report = build_live_report(config, state_of(), pages=pages)
        assert report["pages"] == "separate"
        assert bool(report["warnings"]) == (pages == "packed")
    why = "pages are not packed: 25 window layers do not divide over 4 full ones"
    assert report["warnings"] == [why]
    report = build_live_report(config_of("mla"), state_of(), pages="packed")
    assert report["pages"] is None
    assert report["warnings"] == ["pages are not packed: there are no window layers"]
    report = build_live_report(config_of(), state_of(), pages="packed")
    assert (report["pages"], report["warnings"]) == ("packed", [])
    with pytest.raises(AttnEditError, match="pages: tight: use one of auto, packed, separate"):
        build_live_report(config_of(), state_of(), pages="tight")


def test_packed_pages_are_told_by_their_heads() -> None:
    """One window group of five layers a page; a full block then holds five times the tokens."""
    groups = (WindowGroup(heads=15, blocks=90),)
    report = build_live_report(
        config_of(), state_of(blocks_in_use=90 + 270, running=10, window_groups=groups)
    )
    full, windows = report["groups"]
    assert (full["groups"], windows["groups"]) == (1, 1)
    assert (full["block_size"], windows["block_size"]) == (80, 16)
    assert windows["blocks"] == [90, 90]
    assert full["blocks"] == [270, 270]
    assert report["tokens_per_request"] == [27 * 80, 27 * 80]
    assert full["bytes"][0] == 5 * 270 * 80 * 2 * 3 * 64 * 2
    assert report["teacher_bytes"][0] == 30 * 270 * 80 * 2 * 3 * 64 * 2


def test_latent_layers_are_one_kind() -> None:
    config = config_of("mla")
    report = build_live_report(config, state_of(blocks_in_use=100, running=2))
    (latent,) = report["groups"]
    assert report["split"] == "one kind"
    assert latent["blocks"] == [100, 100]
    assert latent["formula_blocks"] == 100
    assert report["tokens_per_request"] == [800, 800]
    assert report["reduction"][0] == pytest.approx(report["formula_reduction"])


def test_nothing_runs() -> None:
    report = build_live_report(config_of(), state_of())
    assert report["tokens_per_request"] == [0, 0]
    assert report["formula_reduction"] is None
    assert [group["blocks"] for group in report["groups"]] == [[0, 0], [0, 0]]


def test_engines_are_summed_and_fp8_is_followed() -> None:
    text = (RECORDED / "metrics_derived.txt").read_text()
    second = "\n".join(
        line.replace('engine="0"', 'engine="1"')
        for line in text.splitlines()
        if not line.startswith("#")
    )
    both = parse_state(
        f"{text}\n{second}\n".replace('cache_dtype="auto"', 'cache_dtype="fp8_e4m3"')
    )
    one = parse_state(text)
    assert both is not None
    assert one is not None
    assert both.running == 2 * one.running
    assert both.num_blocks == 2 * one.num_blocks
    assert both.blocks_in_use == 2 * one.blocks_in_use
    report = build_live_report(config_of(), both)
    assert report["kv_dtype"] == "fp8"
    assert report["bytes_in_use"] == both.blocks_in_use * A_BLOCK // 2


@pytest.mark.parametrize("text", ["", "<html>hello</html>", "python_info 1.0\n"])
def test_other_pages_are_no_state(text: str) -> None:
    assert parse_state(text) is None


def test_kinds_that_cannot_be_told_apart_are_refused() -> None:
    types = ["full_attention", "latent_attention"] * 15
    edit = config_of("mla").attention_edit | {"layer_types": types}
    with pytest.raises(AttnEditError, match="cannot be told apart"):
        build_live_report(AttnEditConfig("llama", edit, **SMOLLM2), state_of(running=1))
