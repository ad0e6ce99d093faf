"""Which backend serves latent layers here: vLLM's own MLA path, or this project's operators."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend

from vllm_attnedit.config import AttentionEdit
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.ops.mla_decode import MAX_LORA_RANK, MAX_ROPE_DIM, engine_kernel

logger = init_logger(__name__)

BACKEND_OPTION = "attnedit_latent_backend"
"""Key of vLLM's ``--additional-config``: ``auto`` (default), ``vllm`` for its own MLA path whatever
was measured, ``attnedit`` for this project's operators. ``--attention-backend`` names a backend of
vLLM's and means ``vllm``."""

_VLLM_BACKENDS = {
    "fa3": AttentionBackendEnum.FLASH_ATTN_MLA,
    "flashmla": AttentionBackendEnum.FLASHMLA,
}


def latent_backend(
    vllm_config: VllmConfig, edit: AttentionEdit, num_heads: int
) -> type[AttentionBackend]:
    """The backend of latent layers; it ``is_mla()`` if it is vLLM's own.

    Args:
        vllm_config: of the engine, in whose context this is called.
        edit: with latent layers.
        num_heads: query heads of this rank.

    Raises:
        AttnEditError: for an unknown option, or what the chosen backend cannot do.
    """
    option = (vllm_config.additional_config or {}).get(BACKEND_OPTION, "auto")
    if option not in ("auto", "vllm", "attnedit"):
        raise AttnEditError(
            f"--additional-config {BACKEND_OPTION}", option, "use auto, vllm or attnedit"
        )
    if not current_platform.is_cuda():
        if option == "vllm":
            raise AttnEditError(
                f"--additional-config {BACKEND_OPTION}",
                option,
                f"use auto: vLLM has no MLA on {current_platform.device_type}",
            )
        return own_backend(vllm_config, edit)
    if option == "attnedit":
        reason: str | None = f"{BACKEND_OPTION} is attnedit"
    else:
        reason = own_reason(vllm_config, edit)
    if reason is None:
        asked = option == "vllm" or vllm_config.attention_config.backend is not None
        if asked:
            return stock_backend(vllm_config, edit, num_heads)
        tuned, reason = tuned_backend(vllm_config, edit)
        if tuned is not None:
            return tuned
    logger.info_once("Latent layers use this project's Triton operators: %s.", reason)
    return own_backend(vllm_config, edit)


def own_reason(vllm_config: VllmConfig, edit: AttentionEdit) -> str | None:
    """Why vLLM's MLA path is out of question, ``None`` if it is not."""
    if edit.per_head_norm:
        return "qk_norm is per_head, which no other kernel knows"
    if not vllm_config.model_config.use_mla:
        return "vLLM's MLA is disabled (VLLM_MLA_DISABLE)"
    if vllm_config.model_config.dtype not in (torch.bfloat16, torch.float16):
        return f"vLLM's MLA kernels do not take {vllm_config.model_config.dtype}"
    return None


def tuned_backend(
    vllm_config: VllmConfig, edit: AttentionEdit
) -> tuple[type[AttentionBackend] | None, str]:
    """The tuned backend that was measured fastest for these latents here, or the reason for none.

    FlashMLA stands in for FA3 where that refuses, an FP8 cache above all.
    """
    capability = current_platform.get_device_capability()
    assert capability is not None and edit.kv_lora_rank and edit.qk_rope_head_dim
    latent = f"latents of {edit.kv_lora_rank} + {edit.qk_rope_head_dim}"
    kernel = engine_kernel(
        capability_major=capability.major,
        kv_lora_rank=edit.kv_lora_rank,
        qk_rope_head_dim=edit.qk_rope_head_dim,
    )
    if kernel == "triton":
        return None, f"none faster was measured for {latent} on this GPU"
    cache = vllm_config.cache_config
    refusals = []
    for name in sorted(_VLLM_BACKENDS, key=lambda name: name != kernel):
        try:
            backend = _backend_class(name)
        except ImportError as error:
            refusals.append(f"{name}: {error}")
            continue
        refused = backend.validate_configuration(
            head_size=edit.kv_lora_rank + edit.qk_rope_head_dim,
            dtype=vllm_config.model_config.dtype,
            kv_cache_dtype=cache.cache_dtype,
            block_size=cache.block_size if cache.user_specified_block_size else None,
            use_mla=True,
            has_sink=False,
            use_sparse=False,
            use_mm_prefix=False,
            use_per_head_quant_scales=False,
            device_capability=capability,
            attn_type="decoder",
        )
        if not refused:
            return backend, ""
        refusals.append(f"{name}: {', '.join(refused)}")
    return None, "; ".join(refusals)


def _backend_class(name: str) -> type[AttentionBackend]:
    if name == "fa3":
        from vllm_attnedit.backends.latent_fa3 import LatentFA3Backend

        return LatentFA3Backend
    backend: type[AttentionBackend] = _VLLM_BACKENDS[name].get_class()
    return backend


def stock_backend(
    vllm_config: VllmConfig, edit: AttentionEdit, num_heads: int
) -> type[AttentionBackend]:
    """What vLLM would choose, or what the user named."""
    assert edit.kv_lora_rank and edit.qk_rope_head_dim
    backend: type[AttentionBackend] = get_attn_backend(
        edit.kv_lora_rank + edit.qk_rope_head_dim,
        vllm_config.model_config.dtype,
        vllm_config.cache_config.cache_dtype,
        use_mla=True,
        num_heads=num_heads,
    )
    return backend


def own_backend(vllm_config: VllmConfig, edit: AttentionEdit) -> type[AttentionBackend]:
    """This project's, for the platform at hand.

    Raises:
        AttnEditError: for what its kernels do not do: some widths, decode context parallelism, FP8
            on older GPUs, scales that are calculated.
    """
    ranks = vllm_config.parallel_config.decode_context_parallel_size
    if ranks > 1:
        raise AttnEditError(
            "--decode-context-parallel-size", ranks, "use 1: only vLLM's own MLA kernels split it"
        )
    cache_dtype = vllm_config.cache_config.cache_dtype
    if (
        edit.per_head_norm
        and kv_cache_dtype_str_to_dtype(cache_dtype, vllm_config.model_config)
        != vllm_config.model_config.dtype
    ):
        fix = "use auto: qk_norm per_head keeps float32 factors beside the latent"
        raise AttnEditError("--kv-cache-dtype", cache_dtype, fix)
    if vllm_config.cache_config.calculate_kv_scales:
        fix = "leave it out: latents are scaled by what the checkpoint says, or by one"
        raise AttnEditError("--calculate-kv-scales", True, fix)
    if not current_platform.is_cuda():
        from vllm_attnedit.backends.latent_cpu import LatentCPUBackend

        return LatentCPUBackend
    capability = current_platform.get_device_capability()
    if cache_dtype.startswith("fp8") and capability is not None and tuple(capability) < (8, 9):
        fix = "use auto: Triton has FP8 on GPUs of compute capability 8.9 and later alone"
        raise AttnEditError("--kv-cache-dtype", cache_dtype, fix)
    for field, limit in (("kv_lora_rank", MAX_LORA_RANK), ("qk_rope_head_dim", MAX_ROPE_DIM)):
        width = getattr(edit, field)
        if width % 16 or width > limit:
            fix = f"no GPU kernel takes this width: use a multiple of 16 up to {limit}"
            raise AttnEditError(f"attention_edit.{field}", width, fix)
    from vllm_attnedit.backends.latent import LatentBackend

    return LatentBackend
