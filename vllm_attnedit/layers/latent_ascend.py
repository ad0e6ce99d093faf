"""Latent attention (MLA) on Ascend NPUs, through vllm-ascend's own MLA layer.

That one takes a whole layer over: projections, norms, rotation, attention and ``o_proj``. Two
things do not fit it. It rotates pairs that lie side by side, where checkpoints have halves: the
rows that turn are interleaved while weights are loaded. And it has no place for a gate: ``o_proj``
is handed over with the gate before it, whose logits come from the input that the first projection
sees.

Compile- and contract-verified, not run on hardware.

Shapes: T tokens of the batch, N heads of this rank, P qk_rope_head_dim, V v_head_dim, E hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mla import MLAModules, MultiHeadLatentAttentionWrapper
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_attnedit.backends.ascend_limits import NOT_RUN, check_gate, check_latent_attention
from vllm_attnedit.config import AttentionEdit, AttnEditConfig
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.layers.gated import gate_projection
from vllm_attnedit.ops.sigmoid_gate import sigmoid_gate

logger = init_logger(__name__)

_QUERY_NAMES = ("q_proj", "q_b_proj")
_KEY_NAME = "kv_a_proj_with_mqa"


def interleave_rope_rows(
    weights: Iterable[tuple[str, Tensor]], config: AttnEditConfig
) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors, those that turn in vllm-ascend's order.

    Row i of the first half goes to 2 i, of the second half to 2 i + 1, in the last P rows of each
    query head and of the latent projection; biases likewise. Scores stay what they are.
    """
    edit = config.edit
    for name, tensor in weights:
        parts = name.split(".")
        if "self_attn" in parts and parts[-2] in (*_QUERY_NAMES, _KEY_NAME):
            heads = 1 if parts[-2] == _KEY_NAME else config.num_attention_heads
            tensor = interleaved(tensor, heads, edit.qk_rope_head_dim or 0)
        yield name, tensor


def interleaved(tensor: Tensor, heads: int, rope_dim: int) -> Tensor:
    """The last ``rope_dim`` of each head's rows, halves interleaved."""
    by_head = tensor.unflatten(0, (heads, -1))
    rest, turning = by_head.split([by_head.shape[1] - rope_dim, rope_dim], dim=1)
    pairs = turning.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([rest, pairs], dim=1).flatten(0, 1)


def check_ascend_latent(vllm_config: VllmConfig, config: AttnEditConfig, num_heads: int) -> None:
    """Refuse what vllm-ascend's MLA layer computes otherwise, or not at all.

    Raises:
        AttnEditError: naming the field, its value and the fix.
    """
    edit = config.edit
    if edit.per_head_norm:
        raise AttnEditError(
            "attention_edit.qk_norm", edit.qk_norm, "Ascend's MLA norms the latent: edit without it"
        )
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind != "default":
        raise AttnEditError(
            "rope_parameters.rope_type", kind, "vllm-ascend's MLA takes plain RoPE: use default"
        )
    if vllm_config.quant_config is not None:
        name = vllm_config.model_config.quantization
        raise AttnEditError(
            "--quantization", name, "serve unquantised: rows of MLA weights move on Ascend"
        )
    if vllm_config.lora_config is not None:
        raise AttnEditError(
            "--enable-lora", True, "leave it out: adapters' rows do not move as MLA's do on Ascend"
        )
    check_gate(edit.gate, vllm_config.additional_config)
    assert edit.kv_lora_rank and edit.qk_nope_head_dim
    assert edit.qk_rope_head_dim and edit.v_head_dim
    check_latent_attention(
        num_heads=num_heads,
        kv_lora_rank=edit.kv_lora_rank,
        qk_nope_head_dim=edit.qk_nope_head_dim,
        qk_rope_head_dim=edit.qk_rope_head_dim,
        v_head_dim=edit.v_head_dim,
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        block_size=vllm_config.cache_config.block_size,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
    )


class _Borrowed(nn.Module):
    """A layer in vllm-ascend's hands; its parameters stay where checkpoints name them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self._layers = layers  # a tuple: no second time among the model's parameters

    @property
    def weight(self) -> Tensor:
        """What vllm-ascend prefetches."""
        weight = self._layers[0].weight
        assert isinstance(weight, Tensor)
        return weight


class DownProjection(_Borrowed):
    """The projections of the layer's input, end to end; notes the input for the gate."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.seen: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        self.seen = hidden_states
        outputs = [layer(hidden_states)[0] for layer in self._layers]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)), None


class GatedOutput(_Borrowed):
    """``o_proj`` of the gated attention output."""

    def __init__(self, o_proj: nn.Module, g_proj: nn.Module, down: DownProjection, heads: int):
        super().__init__(o_proj, g_proj, down)
        self.num_heads = heads

    def forward(self, attended: Tensor, **options: Any) -> Any:
        """``attended`` (T, N * V), as vllm-ascend calls ``o_proj``."""
        o_proj, g_proj, down = self._layers
        assert isinstance(down, DownProjection) and down.seen is not None
        gate, _ = g_proj(down.seen)
        down.seen = None
        gated = sigmoid_gate(attended.unflatten(-1, (self.num_heads, -1)), gate)
        return o_proj(gated.flatten(-2), **options)


class AscendLatentAttention(nn.Module):
    """One MLA layer."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str) -> None:
        super().__init__()
        config: AttnEditConfig = vllm_config.model_config.hf_text_config
        edit, hidden, bias = config.edit, config.hidden_size, config.qkv_bias
        heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        check_ascend_latent(vllm_config, config, heads)
        logger.warning_once(NOT_RUN)
        assert edit.kv_lora_rank and edit.qk_rope_head_dim
        assert edit.qk_nope_head_dim and edit.v_head_dim
        total_heads = config.num_attention_heads
        q_width = total_heads * edit.qk_head_dim
        if edit.q_lora_rank is None:
            self.q_proj = ColumnParallelLinear(
                hidden, q_width, bias=bias, prefix=f"{prefix}.q_proj"
            )
        else:
            self.q_a_proj = ReplicatedLinear(
                hidden, edit.q_lora_rank, bias=bias, prefix=f"{prefix}.q_a_proj"
            )
            self.q_a_layernorm = RMSNorm(edit.q_lora_rank, eps=config.rms_norm_eps)
            self.q_b_proj = ColumnParallelLinear(
                edit.q_lora_rank, q_width, bias=False, prefix=f"{prefix}.q_b_proj"
            )
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            hidden,
            edit.kv_lora_rank + edit.qk_rope_head_dim,
            bias=bias,
            prefix=f"{prefix}.kv_a_proj_with_mqa",
        )
        self.kv_a_layernorm = RMSNorm(edit.kv_lora_rank, eps=config.rms_norm_eps)
        self.kv_b_proj = ColumnParallelLinear(
            edit.kv_lora_rank,
            total_heads * (edit.qk_nope_head_dim + edit.v_head_dim),
            bias=False,
            prefix=f"{prefix}.kv_b_proj",
        )
        self.o_proj = RowParallelLinear(
            total_heads * edit.v_head_dim, hidden, bias=config.o_bias, prefix=f"{prefix}.o_proj"
        )
        self.g_proj = gate_projection(config, prefix)
        self.attn = self._attention(vllm_config, edit, heads, prefix)

    def _attention(
        self, vllm_config: VllmConfig, edit: AttentionEdit, heads: int, prefix: str
    ) -> nn.Module:
        config: AttnEditConfig = vllm_config.model_config.hf_text_config
        has_q_lora = edit.q_lora_rank is not None
        down = DownProjection(*([self.q_a_proj] if has_q_lora else []), self.kv_a_proj_with_mqa)
        output: nn.Module = self.o_proj
        if self.g_proj is not None:
            output = GatedOutput(self.o_proj, self.g_proj, down, heads)
        modules = MLAModules(
            kv_a_layernorm=self.kv_a_layernorm,
            kv_b_proj=self.kv_b_proj,
            rotary_emb=get_rope(
                edit.qk_rope_head_dim,
                max_position=config.max_position_embeddings,
                rope_parameters=config.rope_parameters,
                is_neox_style=False,
            ),
            o_proj=output,
            fused_qkv_a_proj=down if has_q_lora else None,
            kv_a_proj_with_mqa=None if has_q_lora else down,
            q_a_layernorm=self.q_a_layernorm if has_q_lora else None,
            q_b_proj=self.q_b_proj if has_q_lora else None,
            q_proj=None if has_q_lora else self.q_proj,
            indexer=None,
            is_sparse=False,
            topk_indices_buffer=None,
        )
        return MultiHeadLatentAttentionWrapper(
            config.hidden_size,
            heads,
            edit.qk_head_dim**-0.5,
            edit.qk_nope_head_dim,
            edit.qk_rope_head_dim,
            edit.v_head_dim,
            edit.q_lora_rank,
            edit.kv_lora_rank,
            modules,
            vllm_config.cache_config,
            None,
            prefix,
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """``positions`` (T,), ``hidden_states`` (T, E), normed; returns (T, E)."""
        output: Tensor = self.attn(positions, hidden_states)
        return output
