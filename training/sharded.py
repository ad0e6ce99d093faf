"""Tensors that may be sharded: gradients reduced and clipped, values gathered and put back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def buckets(tensors: list[Tensor], limit: int = 1 << 25) -> Iterable[list[Tensor]]:
    """Groups of up to ``limit`` elements, each reduced at once."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and held + tensor.numel() > limit:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket


def sync_gradients(module: nn.Module, last: bool, gather_once: bool) -> None:
    """Say whether the next backward is the last one of a step.

    Args:
        module: that may be sharded. Its gradients are reduced by the last backward alone.
        last: the next backward is it.
        gather_once: leave weights gathered until then. That costs the memory of all of them.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        if gather_once:
            module.set_reshard_after_backward(last)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, on every process; a plain tensor as it is."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
    else:
        target.copy_(value)


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a norm of at most ``limit`` (0: leave them); returns the norm before.

    Squares are summed in float64 where the device has it. So the norm, which every gradient of
    every later step depends on, is the same however many devices the gradients are sharded over.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    device = gradients[0].device
    precise = torch.float32 if device.type == "npu" else torch.float64
    # Whole gradients are the same on every process; of sharded ones each has its part.
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    held = [local(g) for g in sharded]
    held += [g for g in gradients if not isinstance(g, DTensor)]
    # All at once: a kernel for each of some hundred gradients keeps the device waiting.
    squares = torch.stack(torch._foreach_norm(held, dtype=precise)).square()
    parts = torch.stack([squares[: len(sharded)].sum(), squares[len(sharded) :].sum()])
    if sharded:
        dist.all_reduce(parts[0], group=sharded[0].device_mesh.get_group())
    norm = parts.sum().sqrt()
    if limit > 0:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(held, factor.to(held[0].dtype))
    return norm.float()
