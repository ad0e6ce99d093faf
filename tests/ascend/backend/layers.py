"""vLLM's layers as vllm-ascend replaces them in its worker."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig
from vllm.model_executor import custom_op


def take_ascend_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, vLLM makes vllm-ascend's layers in place of its own."""
    from vllm_ascend.ops import activation, layernorm, linear, rotary_embedding
    from vllm_ascend.ops import vocab_parallel_embedding as vocabulary
    from vllm_ascend.ops.mla import AscendMultiHeadLatentAttention

    for cls in (
        activation.AscendSiluAndMul,
        layernorm.AscendRMSNorm,
        linear.AscendColumnParallelLinear,
        linear.AscendMergedColumnParallelLinear,
        linear.AscendQKVParallelLinear,
        linear.AscendReplicatedLinear,
        linear.AscendRowParallelLinear,
        rotary_embedding.AscendRotaryEmbedding,
        vocabulary.AscendLogitsProcessor,
        vocabulary.AscendParallelLMHead,
        vocabulary.AscendVocabParallelEmbedding,
    ):
        name = cls.__name__.removeprefix("Ascend")
        monkeypatch.setitem(custom_op.op_registry_oot, name, cls)
    wrapper = "MultiHeadLatentAttentionWrapper"
    monkeypatch.setitem(custom_op.op_registry_oot, wrapper, AscendMultiHeadLatentAttention)
    # Its compiled operators need a device.
    monkeypatch.setattr(layernorm, "enable_custom_op", lambda: False)
    # One rotary embedding of each kind and one set of cosines live as long as a worker.
    monkeypatch.setattr("vllm.model_executor.layers.rotary_embedding._ROPE_DICT", {})
    names = ("_cos", "_sin", "_cos_mla", "_sin_mla", "_cos_cache", "_sin_cache", "_cos_sin_cache")
    for name in names:
        monkeypatch.setattr(rotary_embedding, name, None)


def prepare_layers(config: VllmConfig) -> None:
    """What vllm-ascend's runner sets up beside the model, in the context of its configuration."""
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.ops.rotary_embedding import set_cos_and_sin
    from vllm_ascend.utils import set_weight_prefetch_method

    set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)
    set_cos_and_sin(config, 8, 1, torch.float32, torch.device("cpu"))
