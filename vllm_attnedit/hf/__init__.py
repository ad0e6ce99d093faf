"""The reference model in plain PyTorch on transformers."""

# First, and whole: its import registers the model classes (see vllm_attnedit.autoclasses), which
# must not find the modules below half imported.
import transformers.models.auto.modeling_auto  # noqa: F401  isort: skip

from vllm_attnedit.hf.attention import GatedAttention
from vllm_attnedit.hf.latent import LatentAttention
from vllm_attnedit.hf.modeling import AttnEditForCausalLM, AttnEditModel, build_layer

__all__ = [
    "AttnEditForCausalLM",
    "AttnEditModel",
    "GatedAttention",
    "LatentAttention",
    "build_layer",
]
