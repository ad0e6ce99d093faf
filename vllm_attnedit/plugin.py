"""Registration with vLLM: a table of names, idempotent, no device touched."""

from __future__ import annotations

from vllm_attnedit.autoclasses import register_config
from vllm_attnedit.config import ARCHITECTURE, MODEL_TYPE

# architecture -> "module:class", imported by vLLM only when such a model is loaded
MODELS = {ARCHITECTURE: "vllm_attnedit.models.causal_lm:AttnEditForCausalLM"}


def register_with_vllm() -> None:
    """Make vLLM know the configuration and the architecture of edited checkpoints."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from vllm_attnedit.kv_cache.spec import register_spec
    from vllm_attnedit.models.arch import AttnEditArchConvertor

    register_config()
    register_spec()
    MODEL_ARCH_CONFIG_CONVERTORS[MODEL_TYPE] = AttnEditArchConvertor
    for architecture, target in MODELS.items():
        ModelRegistry.register_model(architecture, target)
