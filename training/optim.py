"""AdamW, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.config import OptimConfig


@dataclass(frozen=True)
class Group:
    """Parameters with a peak learning rate of their own."""

    name: str
    lr: float
    parameters: dict[str, nn.Parameter]


def build_optimizer(
    groups: Sequence[Group], config: OptimConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over the groups; weight decay on matrices alone."""
    settings = []
    for group in groups:
        for decayed in (True, False):
            parameters = [p for p in group.parameters.values() if (p.ndim > 1) == decayed]
            if parameters:
                settings.append(
                    {
                        "params": parameters,
                        "lr": group.lr,
                        "peak": group.lr,
                        "name": group.name,
                        "weight_decay": config.weight_decay if decayed else 0.0,
                    }
                )
    return torch.optim.AdamW(
        settings,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True if device.type == "cuda" else None,
    )


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine from 1 to ``floor``.

    Attributes:
        steps: of the whole run.
        warmup: steps with a rising rate.
        floor: the last factor.
        restarted: step at which AdamW's moments were lost; the rate rises anew from there.
    """

    steps: int
    warmup: int
    floor: float
    restarted: int | None = None

    def factor(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0) over the peak."""
        rise = (step + 1) / (self.warmup + 1) if step < self.warmup else 1.0
        if self.restarted is not None and step - self.restarted < self.warmup:
            rise = min(rise, (step - self.restarted + 1) / (self.warmup + 1))
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return rise * (self.floor + (1 - self.floor) * cosine)


def make_schedule(config: OptimConfig, steps: int, restarted: int | None = None) -> Schedule:
    """The schedule of a run of ``steps`` steps."""
    return Schedule(steps, round(config.warmup * steps), config.min_lr_ratio, restarted)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Apply a factor to every group's peak; returns the rate of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return float(optimizer.param_groups[0]["lr"])


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's running averages of one parameter; empty before the first step."""
    state = optimizer.state.get(parameter, {})
    return {name: state[name] for name in ("exp_avg", "exp_avg_sq") if name in state}


def restore_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int, values: dict[str, Tensor]
) -> None:
    """Put running averages back.

    Args:
        optimizer: over ``parameter``.
        parameter: whose state it is.
        steps: that AdamW has taken.
        values: ``exp_avg`` and ``exp_avg_sq``, placed like the parameter.
    """
    fused = any(group.get("fused") for group in optimizer.param_groups)
    device = parameter.device if fused else torch.device("cpu")
    step = torch.tensor(float(steps), dtype=torch.float32, device=device)
    optimizer.state[parameter] = {"step": step, **values}
