# No postponed annotations here: vLLM's compile decorator reads them to find the dynamic arguments.
"""Decoder layers and the compiled inner model of every family."""

from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from vllm_attnedit.config import LATENT, AttnEditConfig
from vllm_attnedit.layers.fast_prefill import fast_prefill
from vllm_attnedit.layers.gated import GatedAttention
from vllm_attnedit.layers.latent import LatentAttention
from vllm_attnedit.models.stacks import Stacks
from vllm_attnedit.tensors import is_moe_layer


def latent_layer() -> type[nn.Module]:
    """The MLA layer of this platform."""
    if current_platform.device_type == "npu":
        from vllm_attnedit.layers.latent_ascend import AscendLatentAttention

        return AscendLatentAttention
    return LatentAttention


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer; all families share this shape. The MLP is vLLM's own."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: AttnEditConfig = vllm_config.model_config.hf_text_config
        layer_idx = extract_layer_index(prefix)
        latent = config.edit.layer_types[layer_idx] == LATENT
        attention = latent_layer() if latent else GatedAttention
        self.self_attn = attention(vllm_config, layer_idx, prefix=f"{prefix}.self_attn")
        if is_moe_layer(config, layer_idx):
            self.mlp = Qwen3MoeSparseMoeBlock(vllm_config=vllm_config, prefix=f"{prefix}.mlp")
        else:
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                bias=getattr(config, "mlp_bias", False),
                prefix=f"{prefix}.mlp",
            )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, hidden) in, the same out, with the residual stream kept apart so norms can fuse."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile(enable_if=lambda vllm_config: not fast_prefill(vllm_config))
class AttnEditModel(nn.Module):
    """Embedding, this pipeline stage's layers, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: AttnEditConfig = vllm_config.model_config.hf_text_config
        self.config = config
        first, last = get_pp_group().is_first_rank, get_pp_group().is_last_rank
        if first or (config.tie_word_embeddings and last):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: DecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = (
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if last else PPMissingLayer()
        )
        self.stacks: Stacks | None = None
        if fast_prefill(vllm_config):
            self.stacks = Stacks(vllm_config, prefix, list(self.layers))
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            hidden_states = (
                inputs_embeds if inputs_embeds is not None else self.embed_input_ids(input_ids)
            )
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        if self.stacks is not None:
            hidden_states, residual = self.stacks(positions, hidden_states)
        else:
            for layer in islice(self.layers, self.start_layer, self.end_layer):
                hidden_states, residual = layer(positions, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states
