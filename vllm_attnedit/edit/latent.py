"""Initial weights of an MLA layer that inherits the teacher's attention.

The steps, all from the layer's own weights and the second moment of its inputs:

1. Projections become rows over the input, biases as a last column. A per-head QK-norm is replaced
   by its average: rows are scaled by the norm's weight over the root mean square of the head. Where
   the edit keeps the per-head norm, its weights are the average length of what comes out at the
   end, so that it is the identity on average and acts on what differs from token to token.
2. RoPE is split into one shared rotated key and unrotated rest (``rope_split``).
3. The rest of the keys and the values of all KV heads are factorised together at ``kv_lora_rank``
   (``lowrank``), errors measured where they matter (``error_metrics``, as CARE and SVD-LLM weigh
   errors), both parts scaled to the same energy before and back after.
4. The teacher's 1/sqrt(D) becomes the layer's 1/sqrt(C + P) by a factor on the queries.

Exact where it can be: with one KV head, P = D, full rank and no QK-norm nothing is approximated but
the latent norm.

Shapes: H query heads, G KV heads, D the teacher's head width, I inputs, E hidden, R kv_lora_rank,
P qk_rope_head_dim, C qk_nope_head_dim, V = D v_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit.error_metrics import (
    MeasuredRows,
    fit_width,
    output_metric,
    query_metric,
)
from vllm_attnedit.edit.gateswa import output_and_gate
from vllm_attnedit.edit.layout import Shape, attention_prefix
from vllm_attnedit.edit.lowrank import Factors, SecondMoment, factorise
from vllm_attnedit.edit.rope_split import mean_turn, nearest_pairs, split_rope
from vllm_attnedit.edit.statistics import InputStatistics
from vllm_attnedit.edit.store import TensorStore, load_finite
from vllm_attnedit.hf.modeling import rotary_embedding


@dataclass(frozen=True)
class EnergyKept:
    """How much of a layer's keys and values an edit can express.

    Attributes:
        layer: index.
        key: share of the teacher's key energy (0 to 1) that shared key and latent carry together.
            Energy is the mean square over inputs; the rotation that some keys lose is not in it.
        value: the same for values.
    """

    layer: int
    key: float
    value: float


def overall_energy(layers: list[EnergyKept]) -> dict[str, Any] | None:
    """Means over layers and each layer's shares, for provenance; ``None`` without such layers."""
    if not layers:
        return None
    return {
        "key": round(sum(e.key for e in layers) / len(layers), 6),
        "value": round(sum(e.value for e in layers) / len(layers), 6),
        "per_layer": [[round(e.key, 6), round(e.value, 6)] for e in layers],
    }


class LatentInitialiser:
    """Makes the attention tensors of latent layers from the teacher's.

    Args:
        store: the teacher's tensors.
        config: of the edited model.
    """

    def __init__(self, store: TensorStore, config: AttnEditConfig) -> None:
        self._store = store
        self._config = config
        rope_width = config.edit.qk_rope_head_dim
        assert rope_width
        wide: Any = rotary_embedding(config, config.head_dim)
        narrow: Any = rotary_embedding(config, rope_width)
        self._frequencies: Tensor = wide.inv_freq.double()
        self._chosen = nearest_pairs(self._frequencies, narrow.inv_freq.double())
        # Some scalings (YaRN) lengthen rotated queries and keys; the unrotated ones follow suit.
        self._rope_gain = float(wide.attention_scaling) ** 2

    def make(
        self, layer: int, shapes: dict[str, Shape], inputs: InputStatistics
    ) -> tuple[dict[str, Tensor], EnergyKept]:
        """The layer's tensors by full name, and the energy they keep.

        Args:
            layer: index.
            shapes: of the tensors to make, by full name.
            inputs: statistics of the layer's normed input.
        """
        config, edit = self._config, self._config.edit
        prefix = attention_prefix(layer)
        query = self._projection(prefix, "q", inputs.query)
        key = self._projection(prefix, "k", inputs.key)
        value = self._projection(prefix, "v", inputs.key)
        assert edit.qk_nope_head_dim and edit.kv_lora_rank
        heads, groups = len(query), len(key)

        split = split_rope(
            query,
            key,
            query_moment=inputs.query.matrix,
            key_moment=inputs.key.matrix,
            chosen=self._chosen,
            turn=mean_turn(self._frequencies, inputs.distances, heads),
        )
        metric = query_metric(split.q_nope, groups, inputs.query)
        output = load_finite(self._store, f"{prefix}o_proj.weight").double()
        blocks = (
            MeasuredRows(split.k_nope, metric, inputs.key),
            MeasuredRows(value, output_metric(output, heads, groups), inputs.key),
        )
        factors = factorise(torch.cat([b.rows for b in blocks]), inputs.key, edit.kv_lora_rank)
        k_expand, v_expand = (
            block.restore(part)
            for block, part in zip(blocks, factors.expand.split([len(b.rows) for b in blocks]))
        )
        energy = EnergyKept(
            layer,
            _kept(key, split.k_nope, k_expand, factors, inputs.key),
            _kept(value, value, v_expand, factors, inputs.key),
        )

        q_nope, k_expand = fit_width(
            split.q_nope, k_expand, edit.qk_nope_head_dim, metric, factors, inputs.key
        )
        gain = (edit.qk_head_dim / config.head_dim) ** 0.5
        q_rows = gain * torch.cat([self._rope_gain * q_nope, split.q_rope], dim=1)
        factors = factors.balanced(torch.cat([k_expand, v_expand], dim=1).flatten(0, 1))
        kv_rows = factors.expand.unflatten(0, (groups, -1))

        made = output_and_gate(self._store, layer, shapes)
        made |= self._query_tensors(prefix, q_rows.flatten(0, 1), inputs.query)
        reduce = factors.plain_reduce if edit.per_head_norm else factors.reduce
        made |= self._as_linear(f"{prefix}kv_a_proj_with_mqa", torch.cat([reduce, split.k_rope]))
        if edit.per_head_norm:
            nope = kv_rows[:, : edit.qk_nope_head_dim] @ reduce  # (G, C, I)
            shared = split.k_rope.expand(groups, -1, -1)
            k_rows = torch.cat([nope, shared], dim=1)
            made[f"{prefix}q_norm.weight"] = _constant_norm(q_rows, inputs.query)
            made[f"{prefix}k_norm.weight"] = _constant_norm(k_rows, inputs.key)
        else:
            made[f"{prefix}kv_a_layernorm.weight"] = factors.norm_weight
        kv_rows = kv_rows.repeat_interleave(heads // groups, 0)
        made[f"{prefix}kv_b_proj.weight"] = kv_rows.flatten(0, 1)
        return made, energy

    def _projection(self, prefix: str, kind: str, moment: SecondMoment) -> Tensor:
        """Rows of a projection by head, (heads, D, I), float64, with its bias and average norm."""
        rows = load_finite(self._store, f"{prefix}{kind}_proj.weight").double()
        if self._config.qkv_bias:
            bias = load_finite(self._store, f"{prefix}{kind}_proj.bias").double()
            rows = torch.cat([rows, bias[:, None]], dim=1)
        rows = rows.view(-1, self._config.head_dim, rows.shape[1])
        if not self._config.family.qk_norm or kind == "v":
            return rows
        weight = load_finite(self._store, f"{prefix}{kind}_norm.weight").double()
        square = ((rows @ moment.matrix) * rows).sum(2).mean(1)  # E of each head's mean square
        scale = (square + self._config.rms_norm_eps).rsqrt()
        return rows * scale[:, None, None] * weight[:, None]

    def _query_tensors(self, prefix: str, rows: Tensor, moment: SecondMoment) -> dict[str, Tensor]:
        rank = self._config.edit.q_lora_rank
        if rank is None:
            return self._as_linear(f"{prefix}q_proj", rows)
        factors = factorise(rows, moment, rank).balanced()
        return {
            **self._as_linear(f"{prefix}q_a_proj", factors.reduce),
            f"{prefix}q_a_layernorm.weight": factors.norm_weight,
            f"{prefix}q_b_proj.weight": factors.expand,
        }

    def _as_linear(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        if not self._config.qkv_bias:
            return {f"{name}.weight": rows}
        return {f"{name}.weight": rows[:, :-1], f"{name}.bias": rows[:, -1]}


def _kept(
    whole: Tensor, part: Tensor, expand: Tensor, factors: Factors, moment: SecondMoment
) -> float:
    """Share of the energy of ``whole`` left when ``part`` of it goes through the factors."""
    error = part - expand @ factors.reduce
    return max(0.0, 1.0 - moment.energy(error) / max(moment.energy(whole), 1e-30))


def _constant_norm(rows: Tensor, moment: SecondMoment) -> Tensor:
    """(D,), the weight with which an RMSNorm of heads (H, D, I) is the identity on average."""
    heads, width, _ = rows.shape
    mean_square = moment.energy(rows) / (heads * width)
    return torch.full((width,), max(mean_square, 1e-30) ** 0.5, dtype=torch.float64)
