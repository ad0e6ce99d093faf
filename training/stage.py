"""What the training loop asks of a stage, and what a stage tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from training.data.batches import Batch
from training.optim import Group


@dataclass
class StepResult:
    """What one step measured, averaged over its tokens and all processes. Scalars on the device.

    Attributes:
        loss: what the step minimises.
        metrics: further scalars by name.
        layers: loss of each trained layer (layers,), in the order of :attr:`Stage.layers`.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    layers: Tensor | None = None


class Stage(Protocol):
    """One way to train: forward, backward and everything that belongs to its loss."""

    @property
    def name(self) -> str:
        """``stage1`` or ``stage2``."""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters of this process, by their names in the checkpoint."""

    @property
    def groups(self) -> Sequence[Group]:
        """All of them, by learning rate."""

    @property
    def layers(self) -> Sequence[int]:
        """Layers whose loss :class:`StepResult` reports."""

    @property
    def split_layers(self) -> bool:
        """Whether processes share out layers, not data."""

    def run(self, batches: Sequence[Batch]) -> StepResult:
        """Forward and backward over the micro-batches of a step; leaves averaged gradients."""

    def clip(self, limit: float) -> Tensor:
        """Clip gradients; returns the largest norm before, not finite if some gradient is not."""

    def blame(self, batches: Sequence[Batch], result: StepResult) -> str:
        """Where a loss or gradient that is not finite comes from: ``layer 7``, or what is known."""

    def flops(self, batches: Sequence[Batch]) -> float:
        """Floating-point operations that the step needs by the model's definition, this process."""
