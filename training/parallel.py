"""Devices and processes: what accelerate finds, gradients averaged over them, models sharded."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from training.config import RunConfig
from training.sharded import buckets
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
        # The main process may tokenise or export for hours; a device's collectives give up earlier.
        self._patient: dist.ProcessGroup | None = None
        if self.ranks > 1:
            self._patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
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
        """Wait for all processes, for as long as it takes."""
        if self._patient is not None:
            dist.barrier(self._patient)

    def main_first(self, make: Callable[[], Result]) -> Result:
        """Call ``make`` on the main process, then on the others, which find its work done.

        Raises:
            AttnEditError: on the others, if it failed on the main process.
        """
        if not self.main:
            if self._failed(0):
                raise AttnEditError("the main process", "failed", "see its message")
            return make()
        try:
            made = make()
        except BaseException:
            with contextlib.suppress(AttnEditError):  # what is wrong here is what counts
                self._failed(1)
            raise
        self._failed(0)
        return made

    def _failed(self, here: int) -> bool:
        """Whether something failed on some process, once all have said so."""
        flag = torch.tensor(float(here))
        if self._patient is not None:
            try:
                dist.all_reduce(flag, group=self._patient)
            except RuntimeError as error:
                raise AttnEditError("another process", "ended", "see its message") from error
        return bool(flag)

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
        for bucket in buckets(local):
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
