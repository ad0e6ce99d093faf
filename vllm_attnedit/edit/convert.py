"""Edits a checkpoint, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vllm_attnedit.config import LATENT, AttnEditConfig
from vllm_attnedit.edit.assembly import (
    Assembly,
    Progress,
    edited_config,
    output_dtype,
    plan_shards,
    planned_dtypes,
    silent,
)
from vllm_attnedit.edit.calibration import Calibration, run_statistics
from vllm_attnedit.edit.gateswa import inherited_attention, random_attention
from vllm_attnedit.edit.latent import EnergyKept, LatentInitialiser, overall_energy
from vllm_attnedit.edit.layout import Shape, check_tensors, edited_attention, teacher_tensors
from vllm_attnedit.edit.output import check_output, output_folder
from vllm_attnedit.edit.patterns import EditPlan, build_edit
from vllm_attnedit.edit.provenance import edit_provenance, fingerprint
from vllm_attnedit.edit.statistics import InputStatistics, statistics_from_weights
from vllm_attnedit.edit.teacher import Teacher, open_teacher
from vllm_attnedit.edit.writer import write_index
from vllm_attnedit.errors import AttnEditError


@dataclass(frozen=True)
class EditReport:
    """What an edit made.

    Attributes:
        out: the edited folder.
        config: of the edited model.
        energy: kept by each latent layer that inherits; empty otherwise.
        nbytes: of weights.
    """

    out: Path
    config: AttnEditConfig
    energy: tuple[EnergyKept, ...]
    nbytes: int


def edit_checkpoint(
    teacher: str | Path,
    out: str | Path,
    plan: EditPlan,
    *,
    calibration: Calibration | None = None,
    revision: str | None = None,
    progress: Progress = silent,
) -> EditReport:
    """Write the edited checkpoint of a teacher.

    Host memory stays near one of the teacher's shards plus one layer, whatever the model's size.

    Args:
        teacher: folder, hub id or ``.gguf`` file.
        out: folder to make; must be new or empty. It appears only when it is complete.
        plan: what to make of it.
        calibration: text that shows which inputs matter, for MLA with ``inherit``. Without it the
            layers' norm weights have to do, which is much worse where projections have no biases.
        revision: of a hub repository.
        progress: called after every tensor.

    Raises:
        AttnEditError: for everything a user can mend; nothing is left behind then.
    """
    out = Path(out)
    check_output(out)
    if calibration is not None and (plan.target != "mla" or plan.init != "inherit"):
        fix = "leave it out: only --target mla with --init inherit looks at text"
        raise AttnEditError("--calibration", calibration.source, fix)
    with open_teacher(teacher, revision) as opened:
        edit = build_edit(plan, opened.config)
        expected = teacher_tensors(opened.config)
        check_tensors(opened.store.tensors, expected, "the teacher")
        dtype = output_dtype(opened, plan.dtype)
        config = edited_config(opened, edit, dtype)
        layers = [edited_attention(config, i) for i in range(config.num_hidden_layers)]
        shards = plan_shards(opened.store, list(expected), layers, dtype)
        energy: list[EnergyKept] = []
        nbytes = sum(tensor.nbytes for shard in shards for tensor in shard)
        with output_folder(out, nbytes) as folder:
            with Assembly(folder, shards, progress) as assembly:
                made = _make_attention(opened, config, plan, layers, calibration, energy)
                for layer in range(len(layers)):
                    assembly.write_all(next(made), f"layer {layer + 1}/{len(layers)}")
                assembly.copy_unedited(opened.store)
            write_index(folder, shards)
            opened.copy_files(folder)
            config.provenance = edit_provenance(
                teacher=opened.name,
                revision=opened.revision,
                plan=plan,
                teacher_fingerprint=fingerprint(
                    opened.store, list(expected), planned_dtypes(shards)
                ),
                calibration=calibration.describe() if calibration else None,
                energy_kept=overall_energy(energy),
            )
            config.save_pretrained(folder)
    return EditReport(out, config, tuple(energy), nbytes)


def _make_attention(
    teacher: Teacher,
    config: AttnEditConfig,
    plan: EditPlan,
    layers: list[dict[str, Shape]],
    calibration: Calibration | None,
    energy: list[EnergyKept],
) -> Iterator[dict[str, Tensor]]:
    """Each layer's attention in turn, by full name. What latent layers keep goes to ``energy``."""
    store = teacher.store
    if plan.init == "random":
        for layer, shapes in enumerate(layers):
            yield random_attention(store, config, layer, shapes, plan.seed)
    elif LATENT not in config.edit.layer_types:
        for layer, shapes in enumerate(layers):
            yield inherited_attention(store, layer, shapes)
    else:
        initialiser = LatentInitialiser(store, config)
        statistics = _statistics(teacher, calibration)
        for layer, shapes in enumerate(layers):
            tensors, kept = initialiser.make(layer, shapes, next(statistics))
            energy.append(kept)
            yield tensors


def _statistics(teacher: Teacher, calibration: Calibration | None) -> Iterator[InputStatistics]:
    if calibration is not None:
        yield from run_statistics(teacher, calibration)
        return
    for layer in range(teacher.config.num_hidden_layers):
        yield statistics_from_weights(teacher.store, teacher.config, layer)
