"""Loads the teacher and the student, and says which tensors train.

Both are the reference model of ``vllm_attnedit.hf``: a teacher is an edited model whose edit
changes nothing, so one class, one kind of mask and one set of names serve both.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from training.data.batches import Batch
from training.files import disk_errors, read_json, sha256_of, write_json
from vllm_attnedit.config import AttentionEdit, AttnEditConfig
from vllm_attnedit.edit import apply_edit
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.edit.teacher import Teacher, open_teacher
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.hf import AttnEditForCausalLM

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def unedited_config(teacher_config: Any, edit: AttentionEdit | None = None) -> AttnEditConfig:
    """A teacher's configuration as that of an edited model: no edit, or a training-free one."""
    fields = teacher_config.to_dict()
    fields.pop("architectures", None)
    return AttnEditConfig(base_model_type=teacher_config.model_type, attention_edit=edit, **fields)


@contextmanager
def teacher_source(source: str, field: str = "teacher") -> Iterator[Teacher]:
    """A teacher that is not loaded; errors name ``field``."""
    try:
        with open_teacher(source) as teacher:
            yield teacher
    except AttnEditError as error:
        if error.field == "TEACHER":
            raise AttnEditError(field, error.value, error.fix) from error
        raise


def load_teacher(
    source: str,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    edit: AttentionEdit | None = None,
) -> AttnEditForCausalLM:
    """A teacher with its own weights, in evaluation mode and frozen.

    Args:
        source: folder, hub id or ``.gguf`` file.
        dtype: of the weights.
        attention: transformers' name of the attention implementation.
        edit: a training-free edit that needs no new tensor (windows without a gate).

    Raises:
        AttnEditError: if it cannot be opened, or is of no supported family.
    """
    with teacher_source(source) as opened:
        config = unedited_config(opened.config, edit)
        if isinstance(opened.store, SafetensorsStore):
            model = AttnEditForCausalLM.from_pretrained(
                opened.store.folder, config=config, dtype=dtype, attn_implementation=attention
            )
        else:
            config._attn_implementation = attention
            model = AttnEditForCausalLM(config).to(dtype)
            state = {name: opened.store.load(name).to(dtype) for name in opened.store.tensors}
            missing, unexpected = model.load_state_dict(state, strict=False)
            model.tie_weights()
            if set(missing) - {"lm_head.weight"} or unexpected:
                names = sorted({*missing, *unexpected})
                raise AttnEditError("teacher", names, "use a checkpoint of the plain architecture")
    model.requires_grad_(False)
    return model.eval()


class Trunk(nn.Module):
    """A model up to its last hidden states.

    The unit that is sharded as a whole: the head, which is used without being called, is gathered
    with it.
    """

    def __init__(self, model: AttnEditForCausalLM) -> None:
        super().__init__()
        self.lm = model

    def forward(self, batch: Batch, masks: dict[str, Any]) -> Tensor:
        """Last hidden states (B, T, E) of a batch under masks by layer type."""
        embedded: Tensor = self.lm.model.embed_tokens(batch.input_ids)
        if torch.is_autocast_enabled(embedded.device.type):
            # A trained embedding is float32; autocast would leave the residual stream as wide.
            embedded = embedded.to(torch.get_autocast_dtype(embedded.device.type))
        hidden: Tensor = self.lm.model(
            inputs_embeds=embedded,
            attention_mask=masks,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        return hidden

    @property
    def head(self) -> Tensor:
        """The output head (V, E); whole after a forward pass."""
        weight: Tensor = self.lm.lm_head.weight
        return weight

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.lm.model.layers)

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer."""
        module: Any = self.lm.model.layers[layer]
        found: nn.Module = module.self_attn
        return found


def load_student(
    source: str, *, dtype: torch.dtype, attention: str = "sdpa"
) -> AttnEditForCausalLM:
    """An edited model from its folder, in evaluation mode and frozen.

    Raises:
        AttnEditError: if there is none.
    """
    folder = student_folder(source)
    model = AttnEditForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    model.requires_grad_(False)
    return model.eval()


def unpack_student(teacher: str, student: str | None, output: Path) -> str | None:
    """Where the student's folder is; an edit alone is first applied to the teacher.

    Args:
        teacher: that the edit belongs to.
        student: a folder, or the file of an edit.
        output: of the run; the applied edit becomes its folder ``student``, made anew if the file
            has changed.
    """
    if student is None or not Path(student).is_file():
        return student
    folder, about = output / "student", output / "student.json"
    made = {"edit": sha256_of(Path(student)), "teacher": teacher}
    known = read_json(about, "student") if about.is_file() else None
    if known != made or not (folder / "config.json").is_file():
        if known is None and folder.exists():
            fix = "name another output folder: the edit is unpacked there, and this one exists"
            raise AttnEditError("output", folder, fix)
        with disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            output.mkdir(parents=True, exist_ok=True)
            write_json(about, made)
        apply_edit(teacher, student, folder)
    return str(folder)


def student_folder(source: str | None) -> Path:
    """The folder of an edited checkpoint.

    Raises:
        AttnEditError: if it is none.
    """
    if source is None:
        raise AttnEditError(
            "student", "missing", "make one: attnedit edit TEACHER OUT --target ..."
        )
    folder = Path(source)
    if not (folder / "config.json").is_file():
        fix = (
            "give the folder or the edit of an edited model: attnedit edit TEACHER OUT --target ..."
        )
        raise AttnEditError("student", source, fix)
    return folder


def student_config(source: str | None) -> AttnEditConfig:
    """The configuration of an edited checkpoint.

    Raises:
        AttnEditError: if there is none, or it belongs to an unedited model.
    """
    folder = student_folder(source)
    fields, _ = AttnEditConfig.get_config_dict(folder)
    if fields.get("model_type") != AttnEditConfig.model_type:
        fix = "edit it first: attnedit edit TEACHER OUT --target gateswa"
        raise AttnEditError("student", f"{source} ({fields.get('model_type')})", fix)
    return AttnEditConfig.from_dict(fields)


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a teacher."""
    with teacher_source(source) as opened:
        return opened.load_tokenizer()


def student_tokenizer(folder: Path) -> Any:
    """The tokenizer of an edited checkpoint, or ``None`` if it holds none."""
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        return None
    return AutoTokenizer.from_pretrained(folder)


def is_attention(name: str) -> bool:
    """Whether a tensor belongs to the edited attention of some layer."""
    return ".self_attn." in name


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def select_trained(
    model: nn.Module, everything: bool, dtype: torch.dtype
) -> dict[str, nn.Parameter]:
    """Mark what trains, as float32 master weights; returns it by name.

    Args:
        model: a frozen student.
        everything: all tensors, or those of attention alone.
        dtype: of the frozen rest.
    """
    trained = {}
    for name, parameter in model.named_parameters():
        if everything or is_attention(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            trained[name] = parameter
        else:
            parameter.data = parameter.data.to(dtype)
    return trained
