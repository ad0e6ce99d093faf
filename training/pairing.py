"""Whether teacher, student and run belong together, before anything is loaded."""

from __future__ import annotations

from typing import Any

from training.config import Config
from training.data.prepare import tokenizer_hash
from training.models import (
    load_tokenizer,
    student_config,
    student_folder,
    student_tokenizer,
    teacher_source,
    unedited_config,
)
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit.layout import teacher_tensors
from vllm_attnedit.edit.provenance import fingerprint
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.edit.teacher import Teacher
from vllm_attnedit.errors import AttnEditError

# What teacher and student must share: everything but attention runs on both.
_SHARED = (
    "base_model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "intermediate_size", "vocab_size", "tie_word_embeddings", "rms_norm_eps", "rope_parameters",
)  # fmt: skip


def check_models(config: Config) -> tuple[AttnEditConfig, dict[str, Any]]:
    """The student's configuration, once it is known to fit the teacher, and what both are.

    Returns:
        The configuration; and, for checkpoints, ``teacher`` (a fingerprint of all that an edit
        leaves alone), ``teacher_weights`` (of attention as well) and ``edit`` (the student's).

    Raises:
        AttnEditError: for a student of another architecture or of another teacher's weights, and
            for sequences longer than the teacher reads.
    """
    student = student_config(config.student)
    with teacher_source(config.teacher) as opened:
        teacher = unedited_config(opened.config)
        _check_architecture(teacher, student)
        rest = _check_weights(opened, config, student)
        weights = fingerprint(opened.store, list(teacher_tensors(opened.config)), attention=True)
    longest = int(teacher.max_position_embeddings)
    if config.data.sequence_length > longest:
        fix = f"give at most {longest}, the teacher's longest context"
        raise AttnEditError("data.sequence_length", config.data.sequence_length, fix)
    models = {"teacher": rest, "teacher_weights": weights, "edit": student.edit.to_dict()}
    return student, models


def check_tokenizers(config: Config) -> Any:
    """The teacher's tokenizer, once it is known to be the student's as well.

    Raises:
        AttnEditError: if the student has another one.
    """
    tokenizer = load_tokenizer(config.teacher)
    other = student_tokenizer(student_folder(config.student))
    if other is not None and tokenizer_hash(other) != tokenizer_hash(tokenizer):
        fix = "edit the student again from this teacher: their tokenizers differ"
        raise AttnEditError("student tokenizer", config.student, fix)
    return tokenizer


def _check_architecture(teacher: AttnEditConfig, student: AttnEditConfig) -> None:
    for name in _SHARED:
        mine, theirs = getattr(student, name, None), getattr(teacher, name, None)
        if mine != theirs:
            fix = f"the teacher has {theirs}: use the student that was edited from this teacher"
            raise AttnEditError(f"student {name}", mine, fix)


def _check_weights(teacher: Teacher, config: Config, student: AttnEditConfig) -> str:
    """The teacher's fingerprint, in the dtypes that the student holds it in.

    Same shapes do not make the same model: another fine-tune would train without a complaint.
    """
    store = SafetensorsStore(student_folder(config.student))
    names = [name for name in teacher_tensors(teacher.config) if name in store.tensors]
    found = fingerprint(teacher.store, names, {n: store.tensors[n].dtype for n in names})
    store.close()
    if student.provenance.get("teacher_fingerprint", found) != found:
        fix = "use the student that was edited from this teacher: its other weights differ"
        raise AttnEditError("student", config.student, fix)
    return found
