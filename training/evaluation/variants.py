"""The models that are compared: checkpoints, and training-free edits of the teacher.

A baseline that needs no training is the teacher under another mask. ``sinks`` gives its window
layers the first few tokens besides the window (StreamingLLM, arXiv 2309.17453); ``chosen`` keeps
other layers full, those that a calibration text asks for.

Shapes: B sequences, T tokens, N query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.config import Config
from training.export import EDIT_FILE, MODEL_FOLDER
from training.layer_choice import choose_full_layers, window_edit
from training.models import (
    load_student,
    load_teacher,
    student_config,
    teacher_source,
    unpack_student,
)
from vllm_attnedit.config import SLIDING, AttentionEdit, AttnEditConfig
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.hf import AttnEditForCausalLM

SINKS = "attnedit_sinks"
TEACHER = "teacher"


@dataclass(frozen=True)
class Variant:
    """A model to measure.

    Attributes:
        name: in reports.
        words: what it is, for the ``case`` of report rows (``gateswa inherit trained``).
        load: makes it, on its device and in evaluation mode.
        about: further facts for the report.
    """

    name: str
    words: str
    load: Callable[[], AttnEditForCausalLM]
    about: dict[str, Any]


def sink_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention whose window layers also see the first ``module.config.sinks`` tokens.

    Args:
        module: the attention layer.
        query: (B, N, T, D).
        key: (B, K, T, D).
        value: (B, K, T, D).
        attention_mask: not used: inputs are not padded on the left.
        scaling: of the scores.
        sliding_window: of the layer, or ``None``.

    Returns:
        (B, T, N, D), and no weights.
    """
    mask = None
    if sliding_window is not None:
        places = torch.arange(query.shape[2], device=query.device)
        behind = places[:, None] - places
        near = (behind < sliding_window) | (places < module.config.sinks)
        mask = ((behind >= 0) & near)[None, None]
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    output, _none = sdpa(module, query, key, value, mask, scaling=scaling, is_causal=mask is None)
    return output, None


def load_with_sinks(
    teacher: str, edit: AttentionEdit, sinks: int, dtype: torch.dtype
) -> AttnEditForCausalLM:
    """A teacher whose window layers also see the first ``sinks`` tokens; 0 for plain windows."""
    AttentionInterface.register(SINKS, sink_attention)
    model = load_teacher(teacher, dtype=dtype, attention=SINKS, edit=edit)
    model.config.sinks = sinks
    return model


def make_variants(config: Config, device: torch.device, dtype: torch.dtype) -> list[Variant]:
    """The teacher first, then the checkpoints, then the baselines that were asked for.

    Raises:
        AttnEditError: if a checkpoint is missing, or a baseline has no windows to compare with.
    """
    variants = [
        Variant(
            TEACHER,
            TEACHER,
            lambda: load_teacher(config.teacher, dtype=dtype).to(device),
            {"source": config.teacher},
        )
    ]
    for name, source in model_sources(config).items():
        edited = student_config(source)
        variants.append(
            Variant(
                name,
                f"{describe_edit(edited)} {name}",
                lambda source=source: load_student(source, dtype=dtype).to(device),  # type: ignore[misc]
                {"source": source, "provenance": edited.provenance},
            )
        )
    for baseline in config.evaluate.baselines:
        variants.append(_baseline(config, baseline, device, dtype))
    return variants


def model_sources(config: Config) -> dict[str, str]:
    """Checkpoints by name: those that were named, else the student before and after training.

    A student that a stage has trained before goes by the name of that stage.
    """
    if config.evaluate.models:
        return config.evaluate.models
    found = {}
    if config.student:
        stage = student_config(config.student).provenance.get("stage", "edit")
        found["untrained" if stage == "edit" else str(stage)] = config.student
    return {**found, "trained": f"{config.output}/{MODEL_FOLDER}"}


def unpack_edits(config: Config) -> None:
    """Apply edits that are files to the teacher, and point ``config`` to the folders."""
    output = Path(config.output)
    config.student = unpack_student(config.teacher, config.student, output)
    models = config.evaluate.models
    if not models and not (output / MODEL_FOLDER).exists() and (output / EDIT_FILE).is_file():
        models |= model_sources(config) | {"trained": str(output / EDIT_FILE)}
    for name, source in models.items():
        folder = unpack_student(config.teacher, source, output / "unpacked" / name)
        models[name] = str(folder)


def describe_edit(config: AttnEditConfig) -> str:
    """``gateswa inherit`` and the like."""
    init = str(config.provenance.get("init", ""))
    target = "mla" if config.edit.kv_lora_rank is not None else "gateswa"
    return f"{target} {init}".strip()


def _baseline(config: Config, kind: str, device: torch.device, dtype: torch.dtype) -> Variant:
    window, full = reference_pattern(config)
    with teacher_source(config.teacher) as opened:
        layers = opened.config.num_hidden_layers
    if kind == "sinks":
        sinks = config.evaluate.sinks
        words = f"windows sinks{sinks} W{window} untrained"

        def load_sinks() -> AttnEditForCausalLM:
            edit = window_edit(layers, full, window)
            return load_with_sinks(config.teacher, edit, sinks, dtype).to(device)

        return Variant(kind, words, load_sinks, {"full_layers": list(full), "sinks": sinks})
    chosen = choose_full_layers(config, count=len(full), window=window)

    def load_chosen() -> AttnEditForCausalLM:
        edit = window_edit(layers, chosen.layers, window)
        return load_teacher(config.teacher, dtype=dtype, edit=edit).to(device)

    about = {"full_layers": list(chosen.layers), "calibration_nll": chosen.loss}
    return Variant(kind, f"windows chosen W{window} untrained", load_chosen, about)


def reference_pattern(config: Config) -> tuple[int, tuple[int, ...]]:
    """Window and full layers of the first edited model that has windows: what a baseline copies.

    Raises:
        AttnEditError: if there is none.
    """
    for source in model_sources(config).values():
        edited = student_config(source)
        if edited.sliding_window is not None:
            types = edited.edit.layer_types
            return edited.sliding_window, tuple(i for i, t in enumerate(types) if t != SLIDING)
    fix = "leave it out: no model here has window layers to compare with"
    raise AttnEditError("evaluate.baselines", config.evaluate.baselines, fix)
