"""``AttnEditForCausalLM`` for vLLM: one architecture for every family and target."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from vllm_attnedit.config import LATENT, AttnEditConfig
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.models.decoder import AttnEditModel
from vllm_attnedit.models.graph_key import note_graph
from vllm_attnedit.models.weights import WeightLoader


def check_servable(config: AttnEditConfig, tp_size: int) -> None:
    """Refuse what the reference model runs but the engine cannot, with the reason.

    Raises:
        AttnEditError: for latent layers mixed with others, or heads that do not divide over ranks.
    """
    types = set(config.edit.layer_types)
    if LATENT in types and len(types) > 1:
        raise AttnEditError(
            "attention_edit.layer_types",
            ", ".join(sorted(types)),
            "use latent_attention in all layers or in none: their cache pages differ in size",
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % tp_size:
        raise AttnEditError(
            "--tensor-parallel-size", tp_size, f"use a divisor of the {heads} attention heads"
        )
    if LATENT not in types and kv_heads % tp_size and tp_size % kv_heads:
        raise AttnEditError(
            "--tensor-parallel-size", tp_size, f"use a divisor or multiple of {kv_heads} KV heads"
        )


def check_experts(config: AttnEditConfig, vllm_config: VllmConfig) -> None:
    """Refuse expert parallelism on CPU, where vLLM's kernel would read past the rank's experts, and
    the balancing of experts, which takes what this model does not offer.

    Raises:
        AttnEditError: if it is asked for.
    """
    parallel = vllm_config.parallel_config
    if config.family.moe and parallel.enable_eplb:
        raise AttnEditError("--enable-eplb", True, "leave it out: edited models do not support it")
    if config.family.moe and parallel.enable_expert_parallel and current_platform.is_cpu():
        fix = "leave it out: vLLM's CPU experts take no expert map; tensor parallelism shards them"
        raise AttnEditError("--enable-expert-parallel", True, fix)


def forward_context(
    config: AttnEditConfig, vllm_config: VllmConfig
) -> Callable[[], AbstractContextManager[None]]:
    """What a step runs in.

    On CPU vLLM 0.23's experts, where they are plain products (float32 on processors with AMX),
    look the configuration up as they run, when it is not set any more (vllm-project/vllm#45447).
    """
    if config.family.moe and current_platform.is_cpu():
        return partial(set_current_vllm_config, vllm_config)
    return nullcontext


class AttnEditForCausalLM(nn.Module, SupportsLoRA, SupportsPP):
    """The served model; held to :class:`vllm_attnedit.hf.AttnEditForCausalLM`."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: AttnEditConfig = vllm_config.model_config.hf_text_config
        check_servable(config, get_tensor_model_parallel_world_size())
        check_experts(config, vllm_config)
        self.config = config
        self._forward_context = forward_context(config, vllm_config)
        self.quant_config = vllm_config.quant_config
        if set(config.edit.layer_types) == {LATENT}:
            # No layer has a fused qkv_proj: a latent layer's q_proj stands alone.
            self.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
        self.model = AttnEditModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if not get_pp_group().is_last_rank:
            self.lm_head: nn.Module = PPMissingLayer()
        elif config.tie_word_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        note_graph(vllm_config, self, prefix)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Hidden states (T, hidden) of the batch's tokens."""
        with self._forward_context():
            return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if current_platform.device_type == "npu" and LATENT in self.config.edit.layer_types:
            from vllm_attnedit.layers.latent_ascend import interleave_rope_rows

            weights = interleave_rope_rows(weights, self.config)
        loader = WeightLoader(self, self.config, quantized=self.quant_config is not None)
        return loader.load(weights)
