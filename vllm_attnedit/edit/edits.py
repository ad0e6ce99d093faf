"""An edit alone: the edited attention without the rest of the model, in one safetensors file.

The file holds every ``self_attn`` tensor of the edited model and, in its metadata, the model's
configuration. It is a small part of the checkpoint and gives it back together with the teacher.
That it meets the right teacher is checked by shapes and by the fingerprint of all other weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_attnedit.checkpoint import load_config
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit import compact
from vllm_attnedit.edit.assembly import (
    Assembly,
    Progress,
    Shards,
    plan_shards,
    planned_dtypes,
    silent,
)
from vllm_attnedit.edit.layout import (
    Shape,
    check_tensors,
    edited_attention,
    is_attention,
    teacher_tensors,
)
from vllm_attnedit.edit.output import check_output, output_file, output_folder
from vllm_attnedit.edit.provenance import fingerprint
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.edit.teacher import Teacher, open_teacher
from vllm_attnedit.edit.writer import PlannedTensor, ShardWriter, write_index
from vllm_attnedit.errors import AttnEditError

FORMAT = "attnedit-edit-1"
_FIX_FORMAT = "give a file that was saved as an edit"


def _read_edited_config(folder: Path) -> AttnEditConfig:
    config = load_config(folder, "TEACHER")
    if not isinstance(config, AttnEditConfig):
        raise AttnEditError("TEACHER", folder, "give an edited checkpoint: this one is not edited")
    return config


def save_edit(model: str | Path, out: str | Path) -> int:
    """Write the edit of an edited checkpoint into one file; returns its bytes of weights.

    Args:
        model: folder of the edited checkpoint, freshly edited or trained.
        out: file to make.

    Raises:
        AttnEditError: if weights beside attention differ from the teacher's (an edit alone could
            not give them back), or anything is missing.
    """
    folder, out = Path(model), Path(out)
    config = _read_edited_config(folder)
    store = SafetensorsStore(folder)
    rest = [n for n in teacher_tensors(config.teacher_config()) if not is_attention(n)]
    shapes = _check_model(config, store)
    print_of_rest = fingerprint(store, rest)
    if config.provenance.get("teacher_fingerprint", print_of_rest) != print_of_rest:
        fix = "keep the whole checkpoint: weights beside attention were trained too"
        raise AttnEditError("teacher_fingerprint", print_of_rest[:12], fix)
    dtypes = {store.tensors[name].dtype for name in rest}
    planned = [PlannedTensor(n, s, store.tensors[n].dtype) for n, s in shapes.items()]
    metadata = {
        "attnedit_format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "teacher_fingerprint": print_of_rest,
        # One dtype for all, or each as the teacher stores it.
        "dtype": str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "",
    }
    nbytes = sum(tensor.nbytes for tensor in planned)
    with output_file(out, nbytes) as partial:
        writer = ShardWriter(partial, planned, metadata)
        try:
            for tensor in planned:
                writer.write(tensor.name, store.load(tensor.name))
            writer.close()
        finally:
            writer.abandon()
    store.close()
    return nbytes


def _check_model(config: AttnEditConfig, store: SafetensorsStore) -> dict[str, tuple[int, ...]]:
    """Shapes of the attention of a complete edited checkpoint."""
    teacher = teacher_tensors(config.teacher_config())
    rest = {name: shape for name, shape in teacher.items() if not is_attention(name)}
    attention: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_hidden_layers):
        attention |= edited_attention(config, layer)
    check_tensors(store.tensors, rest | attention, "the checkpoint")
    return attention


def apply_edit(
    teacher: str | Path,
    edit_file: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    progress: Progress = silent,
) -> AttnEditConfig:
    """Write the edited checkpoint that ``save_edit`` took an edit from; returns its configuration.

    Args:
        teacher: the one that the edit was made for: folder, hub id or ``.gguf`` file.
        edit_file: from :func:`save_edit` or :func:`compact_edit`.
        out: folder to make; must be new or empty.
        revision: of a hub repository.
        progress: called after every tensor.

    Raises:
        AttnEditError: if the edit belongs to another teacher, or anything is missing.
    """
    out = Path(out)
    check_output(out)
    saved = _open_edit(edit_file, "--from-edit", (FORMAT, compact.FORMAT))
    config, layers = saved.config, saved.layers
    small = None
    if saved.metadata["attnedit_format"] == compact.FORMAT:
        small = compact.CompactEdit(saved.store, config, layers)
    held = saved.store.tensors if small is None else small.tensors
    check_tensors(held, {k: s for shapes in layers for k, s in shapes.items()}, "the edit")
    with open_teacher(teacher, revision) as opened:
        shards = _check_teacher(opened, saved, {name: info.dtype for name, info in held.items()})
        nbytes = sum(tensor.nbytes for shard in shards for tensor in shard)
        with output_folder(out, nbytes) as folder:
            with Assembly(folder, shards, progress) as assembly:
                for layer, shapes in enumerate(layers):
                    step = f"layer {layer + 1}/{len(layers)}"
                    if small is not None:
                        assembly.write_all(small.layer(layer, shapes, opened.store), step)
                        continue
                    for name in shapes:
                        assembly.write(name, saved.store.load(name), step)
                if small is not None:
                    small.check(opened.name, saved.fix)
                assembly.copy_unedited(opened.store)
            write_index(folder, shards)
            opened.copy_files(folder)
            config.save_pretrained(folder)
    saved.store.close()
    return config


def compact_edit(
    teacher: str | Path, edit_file: str | Path, out: str | Path, *, revision: str | None = None
) -> int:
    """Write a saved edit as int8 differences from the teacher's attention; returns its bytes.

    Args:
        teacher: the one that the edit was made for: folder, hub id or ``.gguf`` file.
        edit_file: from :func:`save_edit`, of a GateSWA model.
        out: file to make.
        revision: of a hub repository.

    Raises:
        AttnEditError: if the edit belongs to another teacher, or is not of GateSWA.
    """
    saved = _open_edit(edit_file, "--compact-edit", (FORMAT,))
    shapes = {name: shape for layer in saved.layers for name, shape in layer.items()}
    check_tensors(saved.store.tensors, shapes, "the edit")
    with open_teacher(teacher, revision) as opened:
        _check_teacher(opened, saved, {n: info.dtype for n, info in saved.store.tensors.items()})
        nbytes = compact.write_compact(
            saved.store, saved.metadata, saved.config, saved.layers, opened.store, Path(out)
        )
    saved.store.close()
    return nbytes


@dataclass(frozen=True)
class _Saved:
    """The file of an edit, opened."""

    store: SafetensorsStore
    metadata: dict[str, str]
    config: AttnEditConfig

    @property
    def layers(self) -> list[dict[str, Shape]]:
        """Attention tensors of each layer, by full name."""
        return [edited_attention(self.config, i) for i in range(self.config.num_hidden_layers)]

    @property
    def fix(self) -> str:
        """What to do about a teacher that it does not belong to."""
        name = self.config.provenance.get("teacher", "unknown")
        return f"apply this edit to its own teacher, {name}"


_NEEDED = ("dtype", "teacher_fingerprint")
"""What the header of a saved edit has beside its format and configuration."""


def _open_edit(path: str | Path, option: str, formats: tuple[str, ...]) -> _Saved:
    path = Path(path)
    if not path.is_file():
        raise AttnEditError(option, path, f"no such file; {_FIX_FORMAT}")
    store = SafetensorsStore(path.parent, path.name)
    metadata = store.metadata()
    if metadata.get("attnedit_format") not in formats or "config" not in metadata:
        raise AttnEditError(option, path, f"not a saved edit; {_FIX_FORMAT}")
    try:
        config = AttnEditConfig.from_dict(json.loads(metadata["config"]))
    except AttnEditError:
        raise
    except (ValueError, TypeError) as error:
        raise AttnEditError(
            option, path, f"its header is damaged ({error}); {_FIX_FORMAT}"
        ) from error
    absent = [name for name in _NEEDED if name not in metadata]
    if absent:
        raise AttnEditError(option, path, f"its header lacks {absent[0]}; {_FIX_FORMAT}")
    return _Saved(store, metadata, config)


def _check_teacher(teacher: Teacher, saved: _Saved, dtypes: dict[str, torch.dtype]) -> Shards:
    """The files of the edited checkpoint, once the teacher is known to be the edit's own."""
    expected = teacher_tensors(teacher.config)
    check_tensors(teacher.store.tensors, expected, "the teacher")
    if teacher_tensors(saved.config.teacher_config()) != expected:
        raise AttnEditError("TEACHER", f"{teacher.name}: other dimensions", saved.fix)
    named = saved.metadata["dtype"]
    dtype = getattr(torch, named) if named else None
    shards = plan_shards(teacher.store, list(expected), saved.layers, dtype, dtypes)
    found = fingerprint(teacher.store, list(expected), planned_dtypes(shards))
    if found != saved.metadata["teacher_fingerprint"]:
        raise AttnEditError("TEACHER", f"{teacher.name}: other weights", saved.fix)
    return shards
