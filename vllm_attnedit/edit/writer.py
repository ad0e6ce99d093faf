"""Writes safetensors files one tensor at a time.

Files are laid out before the first tensor is known: names, shapes and dtypes are planned, so
tensors can be written as they are made, in any order, and none is held. (The safetensors library
writes whole files from memory, which would need a shard of it.)
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_attnedit.edit.store import INDEX_FILE, SINGLE_FILE, is_finite, not_finite
from vllm_attnedit.errors import AttnEditError

_CODES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int8: "I8",
}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardWriter:
    """One safetensors file whose tensors may be written in any order.

    The layout is the safetensors format: the header's length (8 bytes, little endian), the header
    (JSON, padded with spaces to 8 bytes), the tensors' bytes without gaps.
    """

    def __init__(
        self, path: Path, tensors: Sequence[PlannedTensor], metadata: dict[str, str] | None = None
    ) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"} | (metadata or {})}
        self._planned = {tensor.name: tensor for tensor in tensors}
        self._offset: dict[str, int] = {}
        end = 0
        for tensor in tensors:
            self._offset[tensor.name] = end
            header[tensor.name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = set(self._planned)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        _write_all(self._fd, len(text).to_bytes(8, "little") + text, 0)
        if end:
            _claim_space(self._fd, self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, cast to its planned dtype.

        Raises:
            AttnEditError: if it is not finite, or not in the planned dtype.
        """
        planned = self._planned[name]
        if tuple(tensor.shape) != planned.shape:
            raise ValueError(f"{name}: planned as {planned.shape}, made as {tuple(tensor.shape)}")
        cast = tensor.detach().to(planned.dtype).contiguous()
        if not is_finite(cast):
            if not is_finite(tensor):
                raise not_finite(name)
            dtype = str(planned.dtype).removeprefix("torch.")
            fix = f"use --dtype bfloat16: {name} has values beyond its range"
            raise AttnEditError("--dtype", dtype, fix)
        # As raw bytes: numpy knows no bfloat16.
        data: Any = cast.flatten().view(torch.uint8).numpy()
        _write_all(self._fd, memoryview(data), self._start + self._offset[name])
        self._missing.remove(name)

    def nbytes(self, name: str) -> int:
        """Size of a planned tensor in the file."""
        return self._planned[name].nbytes

    def close(self) -> None:
        """Flush to disk. Every planned tensor must have been written."""
        if self._missing:
            raise ValueError(f"never written: {sorted(self._missing)}")
        os.fsync(self._fd)
        self.abandon()

    def abandon(self) -> None:
        """Release the file as it is. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _claim_space(fd: int, size: int) -> None:
    """Reserve the file's space, so that a full disk shows at once and not after an hour."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # what some file systems say
            raise


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def shard_names(count: int) -> list[str]:
    """File names of a checkpoint with so many shards."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(folder: Path, shards: Sequence[Sequence[PlannedTensor]]) -> None:
    """The index of a checkpoint with several shards; nothing for a single one."""
    if len(shards) == 1:
        return
    names = shard_names(len(shards))
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard)},
        "weight_map": {t.name: n for n, shard in zip(names, shards) for t in shard},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
