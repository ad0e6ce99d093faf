"""Where weights come from: one tensor at a time, whatever the container.

A store never holds more than it is asked for. Safetensors files are memory-mapped, and one is open
at a time, so that the mapped pages of a long checkpoint do not add up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_attnedit.errors import AttnEditError

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DTYPE_OF = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: int | None
    """Index of the file that holds it; ``None`` where files are no guide to the output's."""


class TensorStore(Protocol):
    """Named tensors that are read one at a time."""

    tensors: Mapping[str, TensorInfo]

    def load(self, name: str) -> Tensor:
        """The tensor, on the CPU in its stored dtype. Valid until the store is closed."""

    def head(self, name: str, elements: int) -> Tensor:
        """Its first ``elements`` elements or a few more (whole rows), flat; all if it has fewer."""

    def close(self) -> None:
        """Release files."""


def not_finite(name: str) -> AttnEditError:
    """The refusal of a tensor with NaN or Inf."""
    fix = "download the teacher again or repair this tensor"
    return AttnEditError(name, "NaN or Inf weights", fix)


def load_finite(store: TensorStore, name: str) -> Tensor:
    """A tensor that something is computed from, so that NaN is blamed on it and not on the result.

    Raises:
        AttnEditError: if it has NaN or Inf.
    """
    tensor = store.load(name)
    if not is_finite(tensor):
        raise not_finite(name)
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or Inf."""
    # A sum that is finite has no such term and needs no mask of the tensor's size; one that is not
    # may have overflowed, hence the second look.
    total = tensor.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def _damaged(file: Path, error: object) -> AttnEditError:
    return AttnEditError(file.name, error, "download the file again, it is truncated or damaged")


class SafetensorsStore:
    """The tensors of a Hugging Face folder: ``model.safetensors``, or the shards of its index.

    Args:
        folder: with the files.
        file: the one file to read, by name, instead.

    Raises:
        AttnEditError: for a missing shard, a truncated file, or a folder without safetensors.
    """

    def __init__(self, folder: Path, file: str | None = None) -> None:
        self.folder = folder
        self._open: tuple[str, Any] | None = None
        where = {"": file} if file is not None else _weight_map(folder)
        files = sorted(set(where.values()))
        held: dict[str, TensorInfo] = {}
        for shard, part in enumerate(files):
            for name, info in self._read_header(part, shard).items():
                if where.get(name, part) == part:
                    held[name] = info
        for name, part in where.items():
            if name and name not in held:
                fix = f"download the checkpoint again: its index says that {part} holds the tensor"
                raise AttnEditError(name, "missing", fix)
        self.tensors: Mapping[str, TensorInfo] = held
        self._files = files

    def _read_header(self, file: str, shard: int) -> dict[str, TensorInfo]:
        handle = self._handle(file)
        infos = {}
        for name in handle.keys():  # noqa: SIM118 - no mapping
            view = handle.get_slice(name)
            dtype = _DTYPE_OF.get(view.get_dtype(), torch.uint8)
            infos[name] = TensorInfo(tuple(view.get_shape()), dtype, shard)
        return infos

    def _handle(self, file: str) -> Any:
        if self._open is not None and self._open[0] == file:
            return self._open[1]
        self._open = None  # unmapped before the next one is mapped
        try:
            handle = safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _damaged(self.folder / file, error) from error
        self._open = (file, handle)
        return handle

    def _file_of(self, name: str) -> str:
        shard = self.tensors[name].shard
        assert shard is not None
        return self._files[shard]

    def load(self, name: str) -> Tensor:
        tensor: Tensor = self._handle(self._file_of(name)).get_tensor(name)
        return tensor

    def head(self, name: str, elements: int) -> Tensor:
        shape = self.tensors[name].shape
        rows = -(-elements // max(1, torch.Size(shape[1:]).numel()))
        view = self._handle(self._file_of(name)).get_slice(name)
        part: Tensor = view[: min(rows, shape[0])]
        return part.flatten()

    def metadata(self) -> dict[str, str]:
        """The metadata of the (first) file."""
        return dict(self._handle(self._files[0]).metadata() or {})

    def close(self) -> None:
        self._open = None


def _weight_map(folder: Path) -> dict[str, str]:
    """File of each tensor, by the index; ``{"": file}`` for a single file, which needs none."""
    index = folder / INDEX_FILE
    if not index.is_file():
        if (folder / SINGLE_FILE).is_file():
            return {"": SINGLE_FILE}
        raise _no_safetensors(folder)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        where = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, f"no readable weight_map ({error})") from error
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise AttnEditError(INDEX_FILE, file, "name files of the folder itself, without a path")
        if not (folder / file).is_file():
            fix = f"download this shard again: {INDEX_FILE} names it and the folder lacks it"
            raise AttnEditError("missing shard", file, fix)
    return where


def _no_safetensors(folder: Path) -> AttnEditError:
    for pattern in _PICKLES:
        for file in sorted(folder.glob(pattern)):
            fix = (
                "convert the checkpoint to safetensors: a pickle can run any code while it loads, "
                "so it is never opened here"
            )
            return AttnEditError("pickle checkpoint", file.name, fix)
    fix = (
        f"give a model with {SINGLE_FILE} or {INDEX_FILE}, or a .gguf file; "
        "pickle weights are not read, they can run any code"
    )
    return AttnEditError("TEACHER", folder, fix)
