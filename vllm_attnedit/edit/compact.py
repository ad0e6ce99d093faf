"""A saved edit at half its size: int8 differences from the attention that ``inherit`` starts with.

Where that start is comes from the teacher, so only what training changed has to be kept. A matrix
is stored as ``round(difference / scale)``, one float32 scale a row (its largest difference / 127);
gates, norms and biases, which are small, as they are; tensors that did not change, not at all.
``start + scale * int8`` is off by at most half a scale, less than bfloat16's own rounding of a
weight that is larger than its change.

Two SHA-256 go with it: of what is stored, and of the attention it gives back. The second also tells
a teacher whose attention is not the one the edit was made for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vllm_attnedit.config import LATENT, AttnEditConfig
from vllm_attnedit.edit.gateswa import inherited_attention
from vllm_attnedit.edit.layout import Shape
from vllm_attnedit.edit.output import output_file
from vllm_attnedit.edit.store import SafetensorsStore, TensorInfo, TensorStore
from vllm_attnedit.edit.writer import PlannedTensor, ShardWriter
from vllm_attnedit.errors import AttnEditError

FORMAT = "attnedit-edit-int8-1"
SCALE = ".scale"
_LEVELS = 127


def quantize(difference: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (R, C) as int8 (R, C) and a scale a row (R,) float32; a row of zeros has scale 0."""
    scale = difference.abs().amax(dim=1) / _LEVELS
    levels = (difference / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return levels.clamp(-_LEVELS, _LEVELS).to(torch.int8), scale


def restore(start: Tensor, levels: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``start + scale * levels`` in float32, rounded to ``dtype``: (R, C); a scale has (R,)."""
    return (start.float() + levels.float() * scale[:, None]).to(dtype)


def _hash_tensor(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _digest(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256()
    _hash_tensor(digest, name, tensor)
    return digest.digest()


def _together(parts: Mapping[str, bytes]) -> str:
    """One digest of many, whatever their order."""
    return hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()


def is_matrix(name: str, shape: Shape) -> bool:
    """Whether a tensor is kept as int8. Gates start at zero: they are all change, and small."""
    return len(shape) == 2 and not name.endswith("g_proj.weight")


class CompactEdit:
    """Reads a compact edit. Attention tensors come layer by layer, on top of a teacher's.

    Args:
        store: of the file.
        config: of the edited model.
        layers: attention tensors of each layer, by full name.

    Raises:
        AttnEditError: if the file is damaged.
    """

    def __init__(
        self, store: SafetensorsStore, config: AttnEditConfig, layers: list[dict[str, Shape]]
    ) -> None:
        self._store, self._metadata = store, store.metadata()
        dtype = getattr(torch, self._metadata.get("attention_dtype", ""), None)
        hashes = self._metadata.keys() >= {"stored_sha256", "attention_sha256"}
        if not isinstance(dtype, torch.dtype) or not hashes:
            raise AttnEditError("--from-edit", "damaged header", "get the file again")
        self.dtype: torch.dtype = dtype
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(shape, self.dtype, 0)
            for shapes in layers
            for name, shape in shapes.items()
        }
        self._restored = hashlib.sha256()
        parts = {name: _digest(name, store.load(name)) for name in store.tensors}
        if _together(parts) != self._metadata["stored_sha256"]:
            fix = "get the file again: its contents are not those that were written"
            raise AttnEditError("--from-edit", "damaged", fix)

    def layer(
        self, layer: int, shapes: dict[str, Shape], teacher: TensorStore
    ) -> dict[str, Tensor]:
        """The attention tensors of one layer, to be asked for in order."""
        made = inherited_attention(teacher, layer, shapes)
        for name in shapes:
            made[name] = made[name].to(self.dtype)
            if name in self._store.tensors:
                stored = self._store.load(name)
                if is_matrix(name, shapes[name]):
                    scale = self._store.load(name + SCALE)
                    stored = restore(made[name], stored, scale, self.dtype)
                made[name] = stored
            _hash_tensor(self._restored, name, made[name])
        return {name: made[name] for name in shapes}

    def check(self, teacher: str, fix: str) -> None:
        """After the last layer: whether they are what the edit was made from.

        Raises:
            AttnEditError: if the teacher has other attention weights.
        """
        if self._restored.hexdigest() != self._metadata["attention_sha256"]:
            raise AttnEditError("TEACHER", f"{teacher}: other attention weights", fix)


def _differences(
    edit: TensorStore, layers: list[dict[str, Shape]], teacher: TensorStore, dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, Tensor], Tensor]]:
    """Of every attention tensor: its name, what is stored of it, and what that gives back."""
    for layer, shapes in enumerate(layers):
        start = inherited_attention(teacher, layer, shapes)
        for name, shape in shapes.items():
            begun, trained = start[name].to(dtype), edit.load(name)
            if torch.equal(begun, trained):
                yield name, {}, begun
            elif is_matrix(name, shape):
                levels, scale = quantize(trained.float() - begun.float())
                restored = restore(begun, levels, scale, dtype)
                yield name, {name: levels, name + SCALE: scale}, restored
            else:
                yield name, {name: trained}, trained


def write_compact(
    edit: SafetensorsStore,
    metadata: dict[str, str],
    config: AttnEditConfig,
    layers: list[dict[str, Shape]],
    teacher: TensorStore,
    out: Path,
) -> int:
    """Write a saved edit in compact form; returns its bytes of tensors.

    Args:
        edit: what ``save_edit`` wrote.
        metadata: of that file.
        config: of the edited model.
        layers: attention tensors of each layer, by full name.
        teacher: its tensors, already known to belong to the edit.
        out: file to make.

    Raises:
        AttnEditError: for an edit whose start does not follow from the teacher's weights alone.
    """
    if LATENT in config.edit.layer_types:
        fix = "keep the saved edit: an MLA start depends on its calibration, too"
        raise AttnEditError("--compact-edit", "latent_attention", fix)
    dtypes = {edit.tensors[name].dtype for shapes in layers for name in shapes}
    if len(dtypes) > 1:
        listed = sorted(str(dtype) for dtype in dtypes)
        raise AttnEditError("--compact-edit", listed, "edit with one --dtype for all attention")
    dtype = dtypes.pop()
    planned: list[PlannedTensor] = []
    restored_hash, parts = hashlib.sha256(), dict[str, bytes]()
    for name, kept, restored in _differences(edit, layers, teacher, dtype):
        _hash_tensor(restored_hash, name, restored)
        for part, tensor in kept.items():
            planned.append(PlannedTensor(part, tuple(tensor.shape), tensor.dtype))
            parts[part] = _digest(part, tensor)
    header = metadata | {
        "attnedit_format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "attention_dtype": str(dtype).removeprefix("torch."),
        "attention_sha256": restored_hash.hexdigest(),
        "stored_sha256": _together(parts),
    }
    nbytes = sum(tensor.nbytes for tensor in planned)
    with output_file(out, nbytes) as partial:
        # safetensors hands metadata out in any order.
        writer = ShardWriter(partial, planned, dict(sorted(header.items())))
        try:
            for _, kept, _restored in _differences(edit, layers, teacher, dtype):
                for part, tensor in kept.items():
                    writer.write(part, tensor)
            writer.close()
        finally:
            writer.abandon()
    return nbytes
