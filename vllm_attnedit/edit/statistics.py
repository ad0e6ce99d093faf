"""Statistics of the normed input of a teacher's attention layer, from text or from weights alone.

Shapes: T tokens of a window, E hidden, H query heads, I inputs (E, plus 1 where projections have
biases).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_attnedit.edit.lowrank import SecondMoment
from vllm_attnedit.edit.store import TensorStore, load_finite
from vllm_attnedit.families import get_family

PRIOR_SHARE = 1e-3
"""Weight of what the norm's weights alone say, so that inputs unlike the text are not unheard
of."""


@dataclass(frozen=True)
class InputStatistics:
    """Of a layer's normed input.

    Attributes:
        query: second moment over all tokens.
        key: the same where half of the weight goes by the attention a token receives: an attention
            sink is one token in hundreds, and gets most of the attention.
        distances: (H, T) attention that each head pays at each distance, the text's first token
            (the usual sink, whose distance means nothing) left out; ``None`` if unknown.
    """

    query: SecondMoment
    key: SecondMoment
    distances: Tensor | None


def statistics_from_weights(store: TensorStore, config: Any, layer: int) -> InputStatistics:
    """What the norm alone says of a layer's input: independent elements, as large as its norm's."""
    weight = load_finite(store, f"model.layers.{layer}.input_layernorm.weight").double()
    has_one = get_family(config.model_type).qkv_bias(config)
    moment = SecondMoment(torch.diag(_expected_squares(weight, has_one)), None, has_one)
    return InputStatistics(moment, moment, None)


def _expected_squares(norm_weight: Tensor, has_one: bool) -> Tensor:
    """``E[x_i^2]`` of an RMS-normed input with these weights and, if asked, of the constant 1."""
    one = torch.ones(int(has_one), dtype=torch.float64)
    return torch.cat([norm_weight.double() ** 2, one])


class Collector:
    """Listens to a layer's norm and attention while text runs through it."""

    def __init__(self, layer: Any, has_one: bool) -> None:
        self._has_one = has_one
        # Sums are kept on the CPU, wherever the layer runs.
        self._squares = _expected_squares(layer.input_layernorm.weight.cpu(), has_one)
        size = len(self._squares)
        self._tokens = 0
        self._plain = torch.zeros(size, size, dtype=torch.float64)
        self._attended = torch.zeros(size, size, dtype=torch.float64)
        self._mean = torch.zeros(size, dtype=torch.float64)
        self._attended_mean = torch.zeros(size, dtype=torch.float64)
        self._distances: Tensor | None = None
        self._input: Tensor | None = None
        layer.input_layernorm.register_forward_hook(self._on_norm)
        layer.self_attn.register_forward_hook(self._on_attention)

    def _on_norm(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        rows = output[0].double().cpu()  # (T, E)
        if self._has_one:
            rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        self._input = rows

    def _on_attention(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        weights = output[1][0].double().cpu()  # (H, T, T), queries by keys
        rows = self._input
        assert rows is not None
        received = weights.sum((0, 1))  # attention that each token gets
        received = received * len(rows) / received.sum()
        self._tokens += len(rows)
        self._plain.addmm_(rows.T, rows)
        self._attended.addmm_((rows * received[:, None]).T, rows)
        self._mean += rows.sum(0)
        self._attended_mean += received @ rows
        weights[:, :, 0] = 0.0
        by_distance = torch.stack(
            [weights.diagonal(-d, 1, 2).sum(1) for d in range(len(rows))], dim=1
        )
        self._distances = by_distance + (0 if self._distances is None else self._distances)

    def result(self) -> InputStatistics:
        """What was heard, with a little of what the weights alone would have said. Call it once."""
        # In place: at the size of a real model one of these matrices is a good part of a layer.
        self._attended.add_(self._plain).div_(2)
        self._attended_mean.add_(self._mean).div_(2)
        moments = []
        for matrix, mean in (
            (self._plain, self._mean),
            (self._attended, self._attended_mean),
        ):
            share = (1 - PRIOR_SHARE) / self._tokens
            matrix.mul_(share).diagonal().add_(PRIOR_SHARE * self._squares)
            moments.append(SecondMoment(matrix, mean * share, self._has_one))
        return InputStatistics(moments[0], moments[1], self._distances)
