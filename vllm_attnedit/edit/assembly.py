"""Puts an edited checkpoint together: the teacher's tensors and shards, other attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from vllm_attnedit.config import AttentionEdit, AttnEditConfig
from vllm_attnedit.edit.layout import Shape, attention_prefix, is_attention
from vllm_attnedit.edit.store import TensorStore
from vllm_attnedit.edit.teacher import Teacher
from vllm_attnedit.edit.writer import PlannedTensor, ShardWriter, shard_names

SHARD_BYTES = 2 * 10**9
"""Size at which output is cut where the teacher's own files are no guide."""
GGUF_DTYPE = "bfloat16"
Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes written so far, and bytes in all."""
Shards = list[list[PlannedTensor]]


def silent(_step: str, _done: int, _total: int) -> None:
    """A :data:`Progress` that shows nothing."""


def edited_config(
    teacher: Teacher, edit: AttentionEdit, dtype: torch.dtype | None
) -> AttnEditConfig:
    """The configuration of a teacher under an edit, in ``dtype`` or the one its weights have."""
    values = {k: v for k, v in teacher.config.to_dict().items() if not k.startswith("_")}
    values.pop("quantization_config", None)
    stored = teacher.store.tensors["model.embed_tokens.weight"].dtype
    values["dtype"] = dtype or values.get("dtype") or stored
    return AttnEditConfig(base_model_type=teacher.config.model_type, attention_edit=edit, **values)


def output_dtype(teacher: Teacher, name: str | None) -> torch.dtype | None:
    """The dtype to write: the one asked for, bfloat16 for GGUF, else ``None`` (each as stored)."""
    is_gguf = all(info.shard is None for info in teacher.store.tensors.values())
    name = name or (GGUF_DTYPE if is_gguf else None)
    return None if name is None else getattr(torch, name)


def plan_shards(
    store: TensorStore,
    names: Sequence[str],
    layers: Sequence[Mapping[str, Shape]],
    dtype: torch.dtype | None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Shards:
    """What goes into which output file.

    The teacher's shards are mirrored; a layer's attention goes where its ``o_proj`` lies. Without
    shards to mirror, files are cut at :data:`SHARD_BYTES`.

    Args:
        store: the teacher's tensors.
        names: the teacher's tensors in model order.
        layers: the attention tensors of each edited layer.
        dtype: of every tensor; ``None`` keeps what is stored, new ones in ``o_proj``'s dtype.
        dtypes: of single tensors, by name, that differ from that.
    """
    stored = store.tensors
    shards: dict[int, list[PlannedTensor]] = {}
    cut, filled = 0, 0

    def add(name: str, shape: Shape, like: str) -> None:
        nonlocal cut, filled
        source = stored.get(name, stored[like])
        own = (dtypes or {}).get(name)
        planned = PlannedTensor(name, shape, own or dtype or source.dtype)
        if stored[like].shard is None:
            if filled and filled + planned.nbytes > SHARD_BYTES:
                cut, filled = cut + 1, 0
            filled += planned.nbytes
        shard = stored[like].shard
        shards.setdefault(cut if shard is None else shard, []).append(planned)

    pending = dict(enumerate(layers))
    for name in names:
        if not is_attention(name):
            add(name, stored[name].shape, name)
            continue
        layer = int(name.split(".")[2])
        for new, shape in pending.pop(layer, {}).items():
            add(new, shape, f"{attention_prefix(layer)}o_proj.weight")
    return [shards[i] for i in sorted(shards)]


def planned_dtypes(shards: Shards) -> dict[str, torch.dtype]:
    """Dtype of every tensor of a plan, by name."""
    return {tensor.name: tensor.dtype for shard in shards for tensor in shard}


class Assembly:
    """The weight files of a folder while they are written. A context manager that closes them.

    Args:
        folder: where they go.
        shards: what goes into each.
        progress: called after every tensor.
    """

    def __init__(self, folder: Path, shards: Shards, progress: Progress = silent) -> None:
        self._shards = shards
        self._progress = progress
        self._done = 0
        self._total = sum(t.nbytes for shard in shards for t in shard)
        self._writers: list[ShardWriter] = []
        self._writer_of: dict[str, ShardWriter] = {}
        for file, tensors in zip(shard_names(len(shards)), shards):
            writer = ShardWriter(folder / file, tensors)
            self._writers.append(writer)
            self._writer_of |= {tensor.name: writer for tensor in tensors}

    def __enter__(self) -> Assembly:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in self._writers:
            if kind is None:
                writer.close()
            else:
                writer.abandon()

    def write(self, name: str, tensor: Tensor, step: str) -> None:
        """Write one planned tensor."""
        self._writer_of[name].write(name, tensor)
        self._done += self._writer_of[name].nbytes(name)
        self._progress(step, self._done, self._total)

    def write_all(self, tensors: dict[str, Tensor], step: str) -> None:
        """Write tensors by name and empty the dict, so that they are freed here and now."""
        while tensors:
            self.write(*tensors.popitem(), step)

    def copy_unedited(self, store: TensorStore) -> None:
        """Copy all that is not attention, file by file."""
        for index, tensors in enumerate(self._shards):
            step = f"copying {index + 1}/{len(self._shards)}"
            for tensor in tensors:
                if not is_attention(tensor.name):
                    self.write(tensor.name, store.load(tensor.name), step)
