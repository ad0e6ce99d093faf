"""A window layer's attention: which backend serves it, and how the gate gets there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_attention_with_output
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from vllm_attnedit.backends.ascend_limits import NOT_RUN, check_gate
from vllm_attnedit.backends.prologue import Prologue
from vllm_attnedit.backends.steps import decode_query_len
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.kv_cache.spec import GateSWASpec
from vllm_attnedit.layers.packing import Pack
from vllm_attnedit.ops.checks import BLOCK_MULTIPLE, MAX_HEAD_DIM

logger = init_logger(__name__)

BACKEND_OPTION = "attnedit_window_backend"
"""Key of vLLM's ``--additional-config``: ``auto`` (default), or ``stock`` as benchmarks' control:
vLLM's own window attention and allocation, with the gate applied outside."""

NPU = "npu"
"""Ascend's ``device_type``, a platform that vLLM has no name for."""

KERNEL_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")


def asks_for_stock(vllm_config: VllmConfig) -> bool:
    """Whether the user wants vLLM's own window attention."""
    return (vllm_config.additional_config or {}).get(BACKEND_OPTION) == "stock"


def stock_reason(vllm_config: VllmConfig) -> str | None:
    """Why this configuration keeps vLLM's own window attention; ``None`` if it need not.

    Raises:
        AttnEditError: for an unknown option, or for decode context parallelism, which no window
            attention in vLLM supports.
    """
    option = (vllm_config.additional_config or {}).get(BACKEND_OPTION, "auto")
    if option not in ("auto", "stock"):
        raise AttnEditError(f"--additional-config {BACKEND_OPTION}", option, "use auto or stock")
    ranks = vllm_config.parallel_config.decode_context_parallel_size
    if ranks > 1:
        raise AttnEditError(
            "--decode-context-parallel-size", ranks, "use 1: window layers cannot be split over it"
        )
    if option == "stock":
        return f"{BACKEND_OPTION} is stock"
    if vllm_config.kv_transfer_config is not None:
        return "a KV connector is configured, which may read pages after they were returned"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return "the hybrid KV-cache manager is off"
    if vllm_config.parallel_config.use_ubatching:
        return "micro-batching is on, which reorders reads and writes"
    if current_platform.is_cuda():
        return kernel_reason(vllm_config)
    if current_platform.device_type == NPU:
        return ascend_reason(vllm_config)
    if not current_platform.is_cpu():
        return f"there is no window backend for {current_platform.device_type} yet"
    return None


def ascend_reason(vllm_config: VllmConfig) -> str | None:
    """Why windows keep vLLM's allocation on Ascend; ``None`` if they need not.

    Raises:
        AttnEditError: for prefill context parallelism, which splits what a window backend reads,
            and for a gate that would not see all tokens.
    """
    config: AttnEditConfig = vllm_config.model_config.hf_text_config
    check_gate(config.edit.gate, vllm_config.additional_config)
    ranks = vllm_config.parallel_config.prefill_context_parallel_size
    if ranks > 1:
        raise AttnEditError(
            "--prefill-context-parallel-size", ranks, "use 1: window layers cannot be split over it"
        )
    if vllm_config.scheduler_config.async_scheduling:
        return (
            "vllm-ascend keeps the window blocks of steps in flight, which this project's "
            "allocation would not; --no-async-scheduling allows it"
        )
    return None


def kernel_reason(vllm_config: VllmConfig) -> str | None:
    """Why the CUDA kernels cannot serve this configuration; ``None`` if they can.

    Raises:
        AttnEditError: for a block size that neither they nor vLLM's own kernels take.
    """
    cache = vllm_config.cache_config
    if cache.block_size is not None and cache.block_size % BLOCK_MULTIPLE:
        raise AttnEditError("--block-size", cache.block_size, f"use a multiple of {BLOCK_MULTIPLE}")
    if cache.cache_dtype not in KERNEL_CACHE_DTYPES:
        return f"the window kernels do not read a KV cache of {cache.cache_dtype}"
    if cache.cache_dtype.startswith("fp8") and not current_platform.has_device_capability(89):
        return "Triton has FP8 on GPUs of compute capability 8.9 and later alone"
    if cache.calculate_kv_scales:
        return "--calculate-kv-scales is done by vLLM's own attention"
    if envs.VLLM_BATCH_INVARIANT:
        return "the window kernels add up in an order that depends on the batch"
    head_dim = vllm_config.model_config.get_head_size()
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        return f"the window kernels do not take heads of {head_dim}"
    return None


def window_backend(vllm_config: VllmConfig) -> type[AttentionBackend] | None:
    """The backend of window layers here, or ``None`` for vLLM's own, with one log line."""
    reason = stock_reason(vllm_config)
    if current_platform.device_type == NPU and not asks_for_stock(vllm_config):
        from vllm_attnedit.backends.gateswa_ascend import GateSWAAscendBackend

        logger.warning_once(NOT_RUN)
        # Never without its band mask: vllm-ascend's own keeps one key too many.
        if reason is not None:
            logger.warning_once(
                "Window layers use vLLM's own allocation (more KV memory): %s.", reason
            )
        return GateSWAAscendBackend
    if reason is not None:
        logger.warning_once(
            "Window layers use vLLM's own attention and allocation (more KV memory): %s.", reason
        )
        return None
    if current_platform.is_cpu():
        from vllm_attnedit.backends.gateswa_cpu import GateSWACPUBackend

        return GateSWACPUBackend
    from vllm_attnedit.backends.gateswa_triton import GateSWATritonBackend

    return GateSWATritonBackend


class WindowAttention(Attention):
    """vLLM's attention layer with this project's cache specification and a gate.

    The gate logits travel as ``output_scale`` of vLLM's own attention operator: it is already a
    split point of compiled graphs, so piecewise and full CUDA graphs work as they do for vLLM.

    Args:
        pack: this layer's place in a page that it shares with other window layers.
        prologue: what the backend does to queries and keys first; ``None`` if they come finished.
        stored_tail: see :class:`GateSWASpec`.
    """

    def __init__(
        self,
        *arguments: Any,
        num_kv_heads: int,
        layer_idx: int,
        pack: Pack | None,
        prologue: Prologue | None,
        stored_tail: int | None = None,
        prefix: str,
        **options: Any,
    ) -> None:
        if pack is not None:
            options["first_kv_head"] = pack.slot * num_kv_heads
            if pack.slot:
                # vLLM's word for "has no pages of its own".
                options["kv_sharing_target_layer_name"] = prefix.replace(
                    f".{layer_idx}.", f".{pack.holder}."
                )
        super().__init__(*arguments, num_kv_heads=num_kv_heads, prefix=prefix, **options)
        self.pack = pack
        self.prologue = prologue
        self.stored_tail = stored_tail

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        if stock_reason(vllm_config) is not None:
            return spec
        assert isinstance(spec, SlidingWindowSpec)
        return GateSWASpec(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads * (1 if self.pack is None else self.pack.size),
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            sliding_window=spec.sliding_window,
            num_speculative_tokens=decode_query_len(vllm_config) - 1,
            stored_tail=self.stored_tail,
        )

    def forward_gated(
        self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None
    ) -> Tensor:
        """Attend and gate.

        Args:
            query: ``(T, N * D)``, rotated unless there is a prologue.
            key: ``(T, K * D)``, likewise.
            value: ``(T, K * D)``.
            gate: logits ``(T, N)`` or ``(T, N * D)``, or ``None``.

        Returns:
            ``(T, N * D)``.
        """
        output = query.new_empty(query.shape).view(-1, self.num_heads, self.head_size)
        arguments = (
            query.view(-1, self.num_heads, self.head_size),
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size),
            output,
        )
        if self.use_direct_call:
            unified_attention_with_output(*arguments, self.layer_name, output_scale=gate)
        else:
            name = _encode_layer_name(self.layer_name)
            torch.ops.vllm.unified_attention_with_output(*arguments, name, output_scale=gate)
        return output.flatten(1)
