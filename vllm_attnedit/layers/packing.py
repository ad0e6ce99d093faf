"""Packed window pages: several window layers in one page of KV cache.

vLLM groups layers so that every group has as many as the rarest kind: r window layers for each full
one make ``1 + r`` groups, each with its own block manager, block table, slot mapping and metadata
in every step. Packed, the first of each r window layers (the *holder*) asks for pages with r times
its heads, the others share them and use their slice of the heads, and two groups are left. The
price: full-attention blocks grow to r times the tokens, and prefix hits end at multiples of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_attnedit.accounting import pack_size
from vllm_attnedit.config import SLIDING
from vllm_attnedit.errors import AttnEditError

logger = init_logger(__name__)

PAGES_OPTION = "attnedit_window_pages"
"""Key of vLLM's ``--additional-config``: ``packed``, ``separate``, or ``auto`` (default): packed on
CUDA, where it was measured to be faster, if the layers allow it."""


@dataclass(frozen=True)
class Pack:
    """A window layer's place in a shared page.

    Attributes:
        holder: index of the layer that owns the pages.
        slot: this layer's place among those that share them.
        size: how many share them.
    """

    holder: int
    slot: int
    size: int


def find_pack(vllm_config: VllmConfig, layer_types: Sequence[str], layer_idx: int) -> Pack | None:
    """The place of a window layer, or ``None`` where it has pages of its own.

    Raises:
        AttnEditError: for an unknown option.
    """
    option = (vllm_config.additional_config or {}).get(PAGES_OPTION, "auto")
    if option not in ("auto", "separate", "packed"):
        fix = "use auto, separate or packed"
        raise AttnEditError(f"--additional-config {PAGES_OPTION}", option, fix)
    if option == "separate" or (option == "auto" and not current_platform.is_cuda()):
        return None
    reason = _reason_against(vllm_config)
    if reason is not None:
        logger.warning_once("Window pages are not packed: %s.", reason)
        return None
    size = pack_size(layer_types, vllm_config.parallel_config.pipeline_parallel_size)
    if isinstance(size, str):
        if option == "packed":
            logger.warning_once("Window pages are not packed: %s.", size)
        return None
    windows = [i for i, kind in enumerate(layer_types) if kind == SLIDING]
    place, slot = divmod(windows.index(layer_idx), size)
    return Pack(holder=windows[place * size], slot=slot, size=size)


def _reason_against(vllm_config: VllmConfig) -> str | None:
    """Why pages cannot be shared here, whatever the layers are; ``None`` if they can."""
    if current_platform.device_type == "npu":
        return "Ascend's attention takes whole pages"
    cache = vllm_config.cache_config
    if cache.kv_sharing_fast_prefill:
        return (
            "--kv-sharing-fast-prefill would take layers that share a page for layers that share "
            "keys and values"
        )
    if cache.kv_cache_dtype_skip_layers:
        return "--kv-cache-dtype-skip-layers gives layers that would share a page two data types"
    return None
