"""Turns a run's checkpoint into an edited model: a folder for ``vllm serve``, or an edit alone."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from training.checkpoint import GENERATORS
from training.config import Config
from training.files import (
    atomic_folder,
    check_replaceable,
    disk_errors,
    temporary_of,
    write_json,
)
from training.models import student_config, student_folder
from training.parts import PartsReader
from training.resuming import find_checkpoints, read_whole
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit import save_edit
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.edit.teacher import copy_aux_files
from vllm_attnedit.edit.writer import PlannedTensor, ShardWriter, shard_names, write_index
from vllm_attnedit.errors import AttnEditError

MODEL_FOLDER = "model"
EDIT_FILE = "edit.safetensors"
TRAINING = "training.json"
"""In an exported model: the state of the checkpoint that it was made of."""


@dataclass(frozen=True)
class Trained:
    """The trained tensors of a checkpoint under their names on disk."""

    reader: PartsReader

    def names(self) -> dict[str, tuple[str, int | None, str | None]]:
        """Disk name: (name in the run, expert, half of a stacked gate and up projection).

        transformers stacks the experts of a mixture; checkpoints name each one.
        """
        found: dict[str, tuple[str, int | None, str | None]] = {}
        for name in self.reader:
            if name.startswith(GENERATORS):
                continue
            head, _, last = name.rpartition(".")
            if last not in ("gate_up_proj", "down_proj") or not head.endswith(".experts"):
                found[name] = (name, None, None)
                continue
            for expert in range(self.reader.shape(name)[0]):
                if last == "down_proj":
                    found[f"{head}.{expert}.down_proj.weight"] = (name, expert, None)
                    continue
                for half in ("gate_proj", "up_proj"):
                    found[f"{head}.{expert}.{half}.weight"] = (name, expert, half)
        return found

    def load(self, place: tuple[str, int | None, str | None]) -> Tensor:
        """A tensor by what :meth:`names` says of it."""
        name, expert, half = place
        tensor = self.reader.load(name)
        if expert is not None:
            tensor = tensor[expert]
        if half is not None:
            gate, up = tensor.chunk(2, dim=0)
            tensor = gate if half == "gate_proj" else up
        return tensor


def newest_checkpoint(config: Config) -> Path:
    """The checkpoint to export: the one that ``checkpoint.resume`` names, or the run's newest.

    Raises:
        AttnEditError: if there is none.
    """
    named = config.checkpoint.resume
    if named not in ("auto", "never"):
        return Path(named)
    found = find_checkpoints(Path(config.output) / "checkpoints")
    if not found:
        raise AttnEditError("output", config.output, "train first: it holds no checkpoint")
    return found[-1]


def export(config: Config, checkpoint: Path) -> list[Path]:
    """Write what ``checkpoint.export`` asks for; returns the paths.

    Raises:
        AttnEditError: if the student lacks a trained tensor, or the disk cannot take it.
    """
    kind, output = config.checkpoint.export, Path(config.output)
    if kind == "none":
        return []
    model, edit = output / MODEL_FOLDER, output / EDIT_FILE
    write_model(config, checkpoint, model)
    if kind == "checkpoint":
        return [model]
    fresh = temporary_of(edit)
    with disk_errors(edit):
        fresh.unlink(missing_ok=True)
        save_edit(model, fresh)
        os.replace(fresh, edit)
    if kind == "both":
        return [model, edit]
    shutil.rmtree(model)
    return [edit]


def check_export(config: Config, stage: str) -> None:
    """Refuse, before anything is trained, what could not be exported.

    Raises:
        AttnEditError: if an edit alone is wanted of a run that trains more than attention, or the
            result would take the place of teacher, student or somebody else's folder.
    """
    _check_place(config)
    if (
        stage == "stage2"
        and config.stage2.trainable == "all"
        and config.checkpoint.export in ("edit", "both")
    ):
        fix = "set it to checkpoint: an edit alone holds attention, and stage2.trainable is all"
        raise AttnEditError("checkpoint.export", config.checkpoint.export, fix)


def _check_place(config: Config) -> None:
    kind, output = config.checkpoint.export, Path(config.output)
    if kind == "none":
        return
    model, edit = output / MODEL_FOLDER, output / EDIT_FILE
    made = [model] if kind == "checkpoint" else [model, edit]
    for field, source in (("teacher", config.teacher), ("student", config.student)):
        if source is not None and Path(source).resolve() in [path.resolve() for path in made]:
            fix = f"name another: the result would take the place of the {field}, {source}"
            raise AttnEditError("output", config.output, fix)
    check_replaceable(model, TRAINING)


def write_model(config: Config, checkpoint: Path, out: Path) -> None:
    """The student's folder with trained tensors in place of its own, tensor by tensor.

    Weights keep the dtype that the student stores them in.
    """
    base = student_folder(config.student)
    state = read_whole(checkpoint)
    trained = Trained(PartsReader(checkpoint, "weights-"))
    places = trained.names()
    store = SafetensorsStore(base)
    for name in places:
        if name not in store.tensors:
            fix = "export with the student that the run began with"
            raise AttnEditError("student", f"{base} without {name}", fix)
    edited = student_config(config.student)
    edited.provenance = merge_provenance(edited, state)
    with atomic_folder(out, TRAINING) as folder:
        shards = _plan(store)
        for file, shard in zip(shard_names(len(shards)), shards):
            writer = ShardWriter(folder / file, shard)
            try:
                for tensor in shard:
                    place = places.get(tensor.name)
                    writer.write(
                        tensor.name, trained.load(place) if place else store.load(tensor.name)
                    )
                writer.close()
            finally:
                writer.abandon()
        write_index(folder, shards)
        copy_aux_files(base, folder)
        edited.save_pretrained(folder)
        write_json(folder / TRAINING, state)
    store.close()


def _plan(store: SafetensorsStore) -> list[list[PlannedTensor]]:
    """The student's own files."""
    shards: dict[int, list[PlannedTensor]] = {}
    for name, info in store.tensors.items():
        shards.setdefault(info.shard or 0, []).append(PlannedTensor(name, info.shape, info.dtype))
    return [shards[shard] for shard in sorted(shards)]


def merge_provenance(edited: AttnEditConfig, state: dict[str, Any]) -> dict[str, Any]:
    """What the edit said of itself, plus the stage that was just trained."""
    before = dict(edited.provenance)
    stages = [*before.get("stages", []), {"stage": state["stage"], **state["provenance"]}]
    stages[-1] |= {
        "tokens": state["tokens"],
        "steps": state["step"],
        "data_hash": state["data_hash"],
    }
    return before | {
        "stage": state["stage"],
        "tokens_seen": before.get("tokens_seen", 0) + state["tokens"],
        "stages": stages,
    }
