"""What vLLM takes an edited model for before it is built: with or without its MLA path."""

from __future__ import annotations

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from vllm_attnedit.config import LATENT


class AttnEditArchConvertor(ModelArchConfigConvertorBase):
    """On CUDA and Ascend a model of latent layers is MLA to vLLM: one latent a token instead of KV
    heads, for its connectors, its context parallelism and its own MLA layers.

    Not on a CPU, where vLLM has no MLA and would refuse it, or turn chunked prefill off.
    """

    def is_deepseek_mla(self) -> bool:
        # Here, because the plugin imports this module and must not resolve the platform.
        from vllm.platforms import current_platform

        types = set(self.hf_text_config.attention_edit["layer_types"])
        has_mla = current_platform.is_cuda() or current_platform.device_type == "npu"
        return types == {LATENT} and has_mla

    def _get_qk_rope_head_dim(self) -> int:
        width: int = self.hf_text_config.qk_rope_head_dim
        return width
