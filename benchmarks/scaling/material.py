"""A teacher, its student and a text without anything from a network: made up, at true dimensions.

Speed does not depend on values; losses do, so that weights have the scale of a trained model's:
norms keep their size, attention is peaked, next-token distributions are neither flat nor certain.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.models import TEACHERS, write_tokenizer
from benchmarks.names import check_known
from training.data.prepare import tokenizer_hash
from training.data.shards import MANIFEST, ShardWriter
from training.files import atomic_folder
from training.models import unedited_config
from vllm_attnedit.checkpoint import load_config
from vllm_attnedit.edit import EditPlan, edit_checkpoint
from vllm_attnedit.tensors import expected_tensors

LOGIT_SCALE = 2.0
"""Standard deviation of the teacher's logits, in nats: untrained windows are then about as far from
it as they are from a real small model, by some tenths of a nat."""


def make_material(
    name: str, folder: Path, *, target: str, length: int, tokens: int, layers: int | None = None
) -> dict[str, Any]:
    """What a training configuration names: teacher, student and data, made once.

    Args:
        name: a key of :data:`benchmarks.models.TEACHERS`.
        folder: where it goes.
        target: ``gateswa`` or ``mla``.
        length: tokens of a sequence.
        tokens: of the text.
        layers: instead of the model's own number, for a quick try.

    Raises:
        AttnEditError: for a model that is not known.
    """
    check_known("--model", [name], TEACHERS)
    fields = dict(TEACHERS[name])
    if layers is not None:
        fields["num_hidden_layers"] = layers
    teacher = folder / f"{name}-{fields['num_hidden_layers']}"
    student = folder / f"{teacher.name}-{target}"
    if not (teacher / "config.json").is_file():
        with atomic_folder(teacher, "config.json") as made:
            _write_teacher(fields, made)
    if not (student / "config.json").is_file():
        edit_checkpoint(teacher, student, EditPlan(target=target))
        # transformers reads a made-up tokenizer by the rules of the model's own, which an edited
        # model does not have: both read the teacher's.
        for file in student.glob("tokenizer*.json"):
            file.unlink()
    shards = folder / f"text-{fields['vocab_size']}-{length}-{tokens}"
    if not (shards / MANIFEST).is_file():
        with atomic_folder(shards, MANIFEST) as made:
            write_text(made, AutoTokenizer.from_pretrained(teacher), length, tokens)
    data = {"shards": str(shards), "sequence_length": length}
    return {"teacher": str(teacher), "student": str(student), "data": data}


def _write_teacher(fields: dict[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    write_tokenizer(folder, fields["vocab_size"])
    config = unedited_config(load_config(folder))
    draw = torch.Generator().manual_seed(0)
    state = {
        tensor: made_up(tensor, shape, draw).to(torch.bfloat16)
        for tensor, shape in expected_tensors(config).items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def made_up(name: str, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """A tensor (``shape``, float32) whose output has the scale of its input."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    gain = 1.0
    if "embed_tokens" in name or "lm_head" in name:
        gain = LOGIT_SCALE
    elif "q_proj" in name or "k_proj" in name:
        gain = 1.5
    return torch.randn(shape, generator=draw) * (gain * shape[-1] ** -0.5)


def write_text(folder: Path, tokenizer: Any, length: int, tokens: int) -> None:
    """Shards of documents from a quarter to twice the sequence's length, ids drawn uniformly."""
    draw = np.random.default_rng(0)
    writer = ShardWriter(folder, len(tokenizer), with_answers=False)
    while writer.tokens < tokens:
        count = int(draw.integers(max(2, length // 4), 2 * length))
        writer.add(draw.integers(0, len(tokenizer), count), None)
    source = {"kind": "made up", "documents": len(writer.offsets) - 1}
    writer.close(tokenizer=tokenizer_hash(tokenizer), request=None, sources=[source])
