"""The reference model in plain PyTorch on transformers. Importing it registers nothing."""

from vllm_attnedit.hf.attention import GatedAttention, apply_gate
from vllm_attnedit.hf.latent import LatentAttention
from vllm_attnedit.hf.modeling import AttnEditForCausalLM, AttnEditModel, build_layer

__all__ = [
    "AttnEditForCausalLM",
    "AttnEditModel",
    "GatedAttention",
    "LatentAttention",
    "apply_gate",
    "build_layer",
]
