"""The state of a run on disk: weights, optimiser, place in the data, random generators, provenance.

A checkpoint is a folder ``step-00000500`` that appears complete or not at all. It is independent of
the number of devices: sharded tensors are gathered, and layers that were shared out are merged.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.config import Config
from training.files import disk_errors, publish, temporary_of, write_json
from training.optim import moments, restore_moments
from training.options import flatten
from training.parallel import Devices
from training.parts import PartsReader, indexes, write_parts
from training.resuming import (
    STATE,
    check_continuation,
    choose_checkpoint,
    find_checkpoints,
    read_state,
    read_whole,
)
from training.sharded import fill, whole
from training.stage import Stage
from vllm_attnedit.errors import AttnEditError

GENERATORS = "generator/"
"""Start of the names of random generators' states, which lie beside the weights."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Attributes:
        step: the next step, from 0.
        optimizer_steps: that AdamW has taken with its present moments.
        restarted: step at which the moments were lost, if they were.
        path: of the checkpoint; ``None`` for a fresh start.
    """

    step: int = 0
    optimizer_steps: int = 0
    restarted: int | None = None
    path: Path | None = None


class Checkpoints:
    """Saves and restores one run.

    Args:
        config: of the run.
        devices: of the run.
        data_hash: of its shards.
        provenance: what every checkpoint says of its origin.
        models: what :func:`training.pairing.check_models` says of teacher and student.
    """

    def __init__(
        self,
        config: Config,
        devices: Devices,
        data_hash: str,
        provenance: dict[str, Any],
        models: dict[str, Any],
    ) -> None:
        self.folder = Path(config.output) / "checkpoints"
        self._config, self._devices, self._data_hash = config, devices, data_hash
        self._provenance, self._models = provenance, models

    def newest(self) -> Path | None:
        """The last complete checkpoint of this run."""
        return next(reversed(find_checkpoints(self.folder)), None)

    def save(
        self, stage: Stage, optimizer: torch.optim.Optimizer, step: int, resumed: Resumed
    ) -> Path:
        """Write the state after ``step`` steps; older checkpoints beyond ``keep`` go.

        Raises:
            AttnEditError: on every process, if one of them cannot write; older checkpoints stay.
        """
        final = self.folder / f"step-{step:08d}"
        if final.is_dir():
            return final
        temporary = temporary_of(final)

        def everywhere(failure: AttnEditError | None) -> None:
            """What one process cannot do ends it for all of them, at the same place."""
            if self._devices.any(failure is not None):
                if self._devices.main:
                    shutil.rmtree(temporary, ignore_errors=True)
                missing = AttnEditError(str(final), "another process failed", "see its message")
                raise failure or missing

        def on_main(action: Callable[[], None]) -> AttnEditError | None:
            return _attempt(final, action) if self._devices.main else None

        everywhere(on_main(lambda: _fresh(temporary)))
        everywhere(_attempt(final, lambda: self._write(temporary, stage, optimizer)))
        state = self._state(stage, step, step - (resumed.restarted or 0))
        everywhere(on_main(lambda: _finish(temporary, final, state)))
        if self._devices.main:
            for old in find_checkpoints(self.folder)[: -self._config.checkpoint.keep]:
                shutil.rmtree(old, ignore_errors=True)
        self._devices.barrier()
        return final

    def _write(self, folder: Path, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        how, rank = self._config.checkpoint, self._devices.rank
        limit = int(how.parts_mb * (1 << 20)) if how.parts_mb else None
        writes = self._devices.main or stage.split_layers

        def weights() -> Iterator[tuple[str, Tensor]]:
            yield f"{GENERATORS}cpu.{rank}", torch.get_rng_state()
            api, device = self._devices.api, self._devices.device
            if api is not None:
                yield f"{GENERATORS}{device.type}.{rank}", api.get_rng_state(device)
            for name, parameter in stage.trained.items():
                value = whole(parameter)  # every process gathers, whoever writes
                if writes:
                    yield name, value.to(DTYPES[how.weights])

        def states() -> Iterator[tuple[str, Tensor]]:
            for name, parameter in stage.trained.items():
                for moment, value in moments(optimizer, parameter).items():
                    gathered = whole(value)
                    if writes:
                        yield f"{name}/{moment}", gathered.to(DTYPES[how.optimizer])

        tensors = [("weights", weights())]
        if how.optimizer != "none":
            tensors.append(("optimizer", states()))
        try:
            for kind, named in tensors:
                write_parts(folder, f"{kind}-{rank}", named, limit)
        finally:
            # Every process takes part in gathering, whatever became of its own disk: the others
            # would wait for it.
            for _, named in tensors:
                for _ in named:
                    pass

    def _state(self, stage: Stage, step: int, optimizer_steps: int) -> dict[str, Any]:
        config = self._config
        return {
            "stage": stage.name,
            "step": step,
            "tokens": step * config.optim.batch * config.data.sequence_length,
            "next_sequence": step * config.optim.batch,
            "optimizer_steps": optimizer_steps,
            "data_hash": self._data_hash,
            "models": self._models,
            "config": flatten(config),
            "provenance": self._provenance,
        }

    def resume(self, stage: Stage, optimizer: torch.optim.Optimizer) -> Resumed:
        """Restore the newest state, or the one that ``checkpoint.resume`` names.

        Raises:
            AttnEditError: for what :meth:`choose` refuses, and if it cannot be read.
        """
        path = self.choose(stage.name)
        if path is None:
            return Resumed()
        state = read_whole(path)
        weights, running = PartsReader(path, "weights-"), PartsReader(path, "optimizer-")
        have_moments = next(iter(running), None) is not None
        for name, parameter in stage.trained.items():
            if name not in weights:
                fix = "resume with the settings that made it: it trained other tensors"
                raise AttnEditError("checkpoint.resume", f"{path} without {name}", fix)
            fill(parameter, weights.load(name))
            if have_moments and state["optimizer_steps"]:
                values = {}
                for moment in ("exp_avg", "exp_avg_sq"):
                    values[moment] = torch.zeros_like(parameter)
                    fill(values[moment], running.load(f"{name}/{moment}"))
                restore_moments(optimizer, parameter, state["optimizer_steps"], values)
        self._restore_generators(weights)
        step = int(state["step"])
        if not have_moments:
            return Resumed(step, 0, step, path)
        restarted = step - int(state["optimizer_steps"])
        return Resumed(step, int(state["optimizer_steps"]), restarted or None, path)

    def choose(self, stage: str) -> Path | None:
        """The checkpoint that a stage goes on from, if there is any.

        Raises:
            AttnEditError: if it belongs to other data or another configuration, or is not the
                newest of this run.
        """
        path = choose_checkpoint(self.folder, self._config.checkpoint.resume)
        if path is not None:
            state = read_state(path)
            check_continuation(state, self._config, stage, self._data_hash, self._models)
        return path

    def _restore_generators(self, generators: PartsReader) -> None:
        rank = self._devices.rank
        if f"{GENERATORS}cpu.{rank}" in generators:
            torch.set_rng_state(generators.load(f"{GENERATORS}cpu.{rank}"))
        name = f"{GENERATORS}{self._devices.device.type}.{rank}"
        if self._devices.api is not None and name in generators:
            self._devices.api.set_rng_state(generators.load(name), self._devices.device)


def _fresh(folder: Path) -> None:
    # A process that was killed while it saved left its own, at whichever step that was.
    for left in folder.parent.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(temporary: Path, final: Path, state: dict[str, Any]) -> None:
    write_json(temporary / STATE, state | {"indexes": indexes(temporary)})
    publish(final)


def _attempt(final: Path, action: Any) -> AttnEditError | None:
    """Run ``action``; what the disk refuses comes back, so that other processes can be told."""
    try:
        with disk_errors(final):
            action()
    except AttnEditError as error:
        return error
    return None
