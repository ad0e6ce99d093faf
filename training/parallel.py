"""Devices and processes: what accelerate finds, gradients averaged over them, models sharded."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.config import RunConfig
from vllm_attnedit.errors import AttnEditError

Result = TypeVar("Result")


class Devices:
    """The processes of a run and the device of this one.

    Started alone it is one process; under ``accelerate launch`` or ``torchrun`` it is one of many.

    Args:
        run: device, precision, sharding and determinism.
        seed: of torch's generators.
    """

    def __init__(self, run: RunConfig, seed: int) -> None:
        if run.deterministic:
            # cuBLAS reads this once, when it starts.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # Measurements may do what a harness likes; training is strict.
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.state = PartialState(cpu=run.device == "cpu")
        self.device: torch.device = self.state.device
        self.rank: int = self.state.process_index
        self.ranks: int = self.state.num_processes
        self.main: bool = self.state.is_main_process
        self.bf16, self._deterministic = run.precision == "bf16", run.deterministic
        torch.set_float32_matmul_precision("high" if run.precision == "tf32" else "highest")
        self.sharded, self._shard_frozen = run.sharding == "fsdp2", run.shard_frozen
        if self.sharded and self.ranks == 1 and not dist.is_initialized():
            fix = "start it with `accelerate launch` or `torchrun`, or set run.sharding: none"
            raise AttnEditError("run.sharding", run.sharding, fix)
        set_seed(seed)

    @property
    def api(self) -> Any:
        """torch's module for the device, ``torch.cuda`` or ``torch.npu``; ``None`` for a CPU."""
        return None if self.device.type == "cpu" else torch.get_device_module(self.device)

    @property
    def name(self) -> str:
        """The device as its driver calls it."""
        return "cpu" if self.api is None else str(self.api.get_device_name(self.device))

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 computation over float32 master weights, or nothing."""
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @contextlib.contextmanager
    def strict(self) -> Iterator[None]:
        """Nothing but deterministic kernels, if the run is to repeat every bit.

        Flash attention has a deterministic backward and takes it only then: asked to warn, it warns
        and adds up in any order. Compiled code rounds where the model says: what a fusion keeps in
        float32 depends on what else there is to fuse, and that on whether parameters are sharded.

        Raises:
            AttnEditError: naming an operation that has no such kernel.
        """
        if not self._deterministic:
            yield
            return
        torch.use_deterministic_algorithms(True)
        try:
            with inductor.patch(emulate_precision_casts=True):
                yield
        except RuntimeError as error:
            # A failed compilation prints settings that speak of determinism as well.
            named = re.search(r"\S+ does not have a deterministic implementation", str(error))
            if named is None:
                raise
            fix = f"set it to false: {named[0]}"
            raise AttnEditError("run.deterministic", True, fix) from error
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)

    def barrier(self) -> None:
        self.state.wait_for_everyone()

    def main_first(self, make: Callable[[], Result]) -> Result:
        """Call ``make`` on the main process, then on the others, which find its work done."""
        with self.state.main_process_first():
            return make()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Maximum over the processes, in place."""
        if self.ranks > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some process."""
        if self.ranks == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over the processes; sharded parameters are averaged already."""
        if self.ranks == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        local = [g for g in gradients if not isinstance(g, DTensor)]
        for bucket in _buckets(local):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            flat /= self.ranks
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                gradient.copy_(part.view_as(gradient))

    def shard(self, root: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
        """Shard a model's parameters in place (FSDP2).

        Each layer is a unit of its own, gathered when it runs. Where frozen parameters stay whole
        and a layer's trained ones are a part of it, all of these are one unit: gathered and reduced
        once a step. Units so small would cost the host more than they take the device.

        Trained parameters must be float32: matrices are gathered in the compute dtype, as autocast
        would cast them, and their gradients reduced in float32. Vectors, the norms' among them,
        autocast leaves in float32: they stay whole, for :meth:`average_gradients`. So a step is the
        same, sharded or not.
        """
        if not self.sharded:
            return root
        parameters = set(root.parameters())
        frozen = {p for p in parameters if not p.requires_grad}
        kept = set() if self._shard_frozen else frozen
        if kept == parameters:
            return root
        policy = MixedPrecisionPolicy(
            param_dtype=self.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.ranks,)),
            "mp_policy": policy,
            "ignored_params": kept | {p for p in parameters - frozen if p.ndim < 2},
        }
        for layer in layers:
            if kept.isdisjoint(layer.parameters()):
                fully_shard(layer, **options)
        fully_shard(root, **options)
        return root


def _buckets(tensors: list[Tensor], limit: int = 1 << 25) -> Iterable[list[Tensor]]:
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


def sync_gradients(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces a sharded model's gradients; off while accumulating."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)


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
    held = [g.to_local() for g in sharded]
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
