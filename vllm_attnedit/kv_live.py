"""The report behind ``attnedit kv --server``: KV memory in use beside what the formula says.

A block belongs to one *group* of layers. From vLLM's ``/metrics`` come the blocks in use over all
groups and the number of running requests. The split over groups is *measured* where the engine
exports this project's gauge; else it is *derived*: a running request holds between one block and
``ceil((W - 1) / B) + 2`` blocks in each window group, those that have left its first window at
least ``ceil((W - 1) / B)``, and no more tokens than in a full group. Figures are then intervals.
Whether window layers share pages the gauge says, or the bytes of a block where the pool's size is
known; else it is taken to be as servers on CUDA do by default.

The report is JSON-ready, and its fields are stable (new ones may be added). Every figure that can
be an interval is ``[low, high]``, equal if it is exact::

    pages            of window layers, as counted: "packed", "separate", or null if there are none
    split            "measured", "derived" or "one kind" (all blocks hold the same kind of layers)
    tp, kv_dtype     as assumed for bytes, which are those of one GPU
    running, waiting, preemptions
    blocks_in_use, num_blocks       over all groups
    bytes_in_use, pool_bytes        the same in bytes
    tokens_per_request              mean over running requests, in whole blocks; [0, 0] without any
    groups           one object for each kind of layer:
      kind, layers, groups          layer type, number of layers, number of groups
      block_size                    tokens of a block
      blocks, bytes                 in use, over these groups
      formula_blocks, formula_bytes for the running requests at their mean length, all decoding
    teacher_bytes    full attention for the same tokens
    reduction        share of teacher_bytes that is saved
    formula_reduction               the same by formula; null without running requests
    warnings         sentences for people
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vllm_attnedit.accounting import (
    KV_DTYPE_BYTES,
    LayerKV,
    check_tp,
    group_size,
    kv_layers,
    pack_size,
)
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.kv_server import ServerState

Interval = tuple[float, float]

PAGES = ("auto", "packed", "separate")


@dataclass(frozen=True)
class Layout:
    """How a model's layers share the pool. With packed window pages a full block grows to ``pack``
    times the tokens of a window block, and one group holds all window layers.

    Attributes:
        layers: number of layers whose cache grows with the request, and of window layers.
        groups: number of groups of each of the two.
        block_size: tokens of a block of each of the two.
        block_bytes: of any block, on one GPU.
        pack: window layers in a page.
        unpackable: why no page can hold several, if none can.
    """

    layers: tuple[int, int]
    groups: tuple[int, int]
    block_size: tuple[int, int]
    block_bytes: int
    pack: int = 1
    unpackable: str | None = None


def build_live_report(
    config: AttnEditConfig,
    state: ServerState,
    *,
    tp: int = 1,
    kv_dtype: str = "auto",
    pages: str = "auto",
) -> dict[str, Any]:
    """Split the blocks in use over the kinds of layers; see the module for the result.

    Args:
        config: of the edited model that the server runs.
        state: what its ``/metrics`` say.
        tp: tensor-parallel GPUs of the server.
        kv_dtype: a key of ``KV_DTYPE_BYTES``; ``auto`` follows the server's fp8 setting.
        pages: ``packed`` or ``separate`` pages of window layers, or ``auto``: see the module.

    Raises:
        AttnEditError: for arguments that do not fit the model, or layers of kinds whose blocks
            cannot be told apart.
    """
    if kv_dtype == "auto" and state.cache_dtype.startswith("fp8"):
        kv_dtype = "fp8"
    if kv_dtype not in KV_DTYPE_BYTES:
        raise AttnEditError("kv_dtype", kv_dtype, f"use one of {', '.join(KV_DTYPE_BYTES)}")
    if pages not in PAGES:
        raise AttnEditError("pages", pages, f"use one of {', '.join(PAGES)}")
    check_tp(config, tp)
    layers = kv_layers(config)
    growing = [layer for layer in layers if layer.window is None]
    windows = [layer for layer in layers if layer.window is not None]
    if len({layer.layer_type for layer in growing}) > 1:
        fix = "their blocks cannot be told apart; read vllm:kv_cache_usage_perc"
        raise AttnEditError("layer_types", "full_attention, latent_attention", fix)
    layout = _layout(config, growing, windows, state, tp, KV_DTYPE_BYTES[kv_dtype], pages)
    split, window_blocks = _window_blocks(windows, state, layout)
    in_windows = _sorted(blocks * layout.groups[1] for blocks in window_blocks)
    in_growing = _sorted(state.blocks_in_use - blocks for blocks in in_windows)
    tokens = _sorted(
        blocks / max(1, layout.groups[0]) * layout.block_size[0] / max(1, state.running)
        for blocks in in_growing
    )
    if not growing:  # nothing in the cache grows with a request: its length leaves no trace
        tokens = (0, 0)
    if not state.running:
        tokens = (0, 0)
    groups = [
        _group(kind, index, blocks, layout, state.running, sum(tokens) / 2)
        for index, (kind, blocks) in enumerate(((growing, in_growing), (windows, in_windows)))
        if kind
    ]
    per_token = _teacher_bytes_per_token(config, tp, KV_DTYPE_BYTES[kv_dtype])
    teacher = _sorted(per_token * count * state.running for count in tokens)
    in_use = state.blocks_in_use * layout.block_bytes
    formula = sum(group["formula_bytes"] for group in groups)
    refused = pages == "packed" and layout.unpackable is not None
    return {
        "pages": ("packed" if layout.pack > 1 else "separate") if windows else None,
        "split": split,
        "tp": tp,
        "kv_dtype": kv_dtype,
        "running": state.running,
        "waiting": state.waiting,
        "preemptions": state.preemptions,
        "blocks_in_use": state.blocks_in_use,
        "num_blocks": state.num_blocks,
        "bytes_in_use": in_use,
        "pool_bytes": state.num_blocks * layout.block_bytes,
        "tokens_per_request": list(tokens),
        "groups": groups,
        "teacher_bytes": list(teacher),
        "reduction": [1 - in_use / held if held else None for held in teacher],
        "formula_reduction": 1 - formula / (sum(teacher) / 2) if sum(teacher) else None,
        "warnings": [f"pages are not packed: {layout.unpackable}"] if refused else [],
    }


def _layout(
    config: AttnEditConfig,
    growing: list[LayerKV],
    windows: list[LayerKV],
    state: ServerState,
    tp: int,
    width: int,
    pages: str,
) -> Layout:
    counts = (len(growing), len(windows))
    block = state.block_size
    a_layer = (growing or windows)[0].bytes_per_token(width, tp) * block
    size = group_size([count for count in counts if count])
    groups = (-(-counts[0] // size), -(-counts[1] // size))
    separate = Layout(counts, groups, (block, block), a_layer * size)
    pack = pack_size(config.edit.layer_types, 1) if windows else "there are no window layers"
    if isinstance(pack, str):
        return replace(separate, unpackable=pack)
    packed = Layout(counts, (1, 1), (block * pack, block), a_layer * pack * counts[0], pack)
    if state.window_groups:
        heads = max(1, (windows[0].heads or 1) // tp)
        return packed if state.window_groups[0].heads > heads else separate
    if pages == "auto" and state.bytes_per_block is not None:
        # A block's share of the pool, rounded up, is nearest to what it really has.
        share = state.bytes_per_block
        return min(separate, packed, key=lambda layout: abs(share - layout.block_bytes))
    return separate if pages == "separate" else packed


def _window_blocks(
    windows: list[LayerKV], state: ServerState, layout: Layout
) -> tuple[str, Interval]:
    """Blocks in use in one window group, the mean where they were measured."""
    if not windows:
        return "one kind", (0, 0)
    if state.window_groups:
        mean = sum(group.blocks for group in state.window_groups) / layout.groups[1]
        return "measured", (mean, mean)
    if not layout.groups[0]:
        mean = state.blocks_in_use / layout.groups[1]
        return "one kind", (mean, mean)
    window = windows[0].window
    assert window is not None
    span = -(-(window - 1) // state.block_size)
    in_use, pack, (full, window_groups) = state.blocks_in_use, layout.pack, layout.groups
    both = full + window_groups * pack
    # No window group holds more tokens than a full one.
    high = min(state.running * (span + 2), in_use * pack / both)
    if not state.running:
        return "derived", (0, high)
    # Least where all but one request have a single block in each group: the one's window holds its
    # span, or all its tokens, of which its last full block has one or more.
    others = state.running - 1
    left = in_use - others * (full + window_groups)
    low = others + min(span, (left * pack - full * (pack - 1)) / both)
    return "derived", (min(max(0.0, low), high), high)


def _group(
    kind: list[LayerKV], index: int, blocks: Interval, layout: Layout, running: int, tokens: float
) -> dict[str, Any]:
    """One row: ``kind``'s layers, number ``index`` of the layout."""
    size, groups = layout.block_size[index], layout.groups[index]
    per_request = kind[0].tokens_held(round(tokens), size) // size if tokens else 0
    formula = running * per_request * groups
    return {
        "kind": kind[0].layer_type,
        "layers": layout.layers[index],
        "groups": groups,
        "block_size": size,
        "blocks": list(blocks),
        "bytes": [count * layout.block_bytes for count in blocks],
        "formula_blocks": formula,
        "formula_bytes": formula * layout.block_bytes,
    }


def _teacher_bytes_per_token(config: AttnEditConfig, tp: int, width: int) -> int:
    layers = kv_layers(config.teacher_config())
    return sum(layer.bytes_per_token(width, tp) for layer in layers if layer.window is None)


def _sorted(values: Any) -> Interval:
    low, high = sorted(values)
    return low, high
