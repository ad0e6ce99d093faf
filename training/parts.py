"""Named tensors in safetensors files of a bounded size, with an index that says what lies where.

A tensor that does not fit into a file is cut; each piece is a flat slice. So a state travels
through channels that take only small files, whatever the sizes of its tensors. Several processes
may write into one folder, each with an index of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.files import read_json, write_json
from vllm_attnedit.errors import AttnEditError

DEFAULT_LIMIT = 1 << 30
_HEADER = 1 << 17
"""Bytes left free in a file for its header."""


def index_name(writer: str) -> str:
    """The file in which a writer notes what lies where."""
    return f"index-{writer}.json"


def write_parts(
    folder: Path, writer: str, tensors: Iterable[tuple[str, Tensor]], limit: int | None = None
) -> None:
    """Write tensors one by one, holding no more than one file's worth of them.

    Args:
        folder: that exists.
        writer: distinguishes files and index from those of other writers in the folder.
        tensors: name and value; values may be on any device.
        limit: bytes that no file exceeds; 1 GiB by default.
    """
    limit = limit or DEFAULT_LIMIT
    room = limit - min(_HEADER, limit // 2)
    index: dict[str, Any] = {}
    held: dict[str, Tensor] = {}
    free, number = room, 0

    def flush() -> None:
        nonlocal held, free, number
        if held:
            save_file(held, folder / f"{writer}-{number:03d}.safetensors")
            held, free, number = {}, room, number + 1

    for name, tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().flatten()
        pieces: list[list[str | int]] = []
        start = 0
        while start < len(flat) or not pieces:
            if free < flat.element_size():
                flush()
            stop = min(len(flat), start + max(1, free // flat.element_size()))
            held[f"{name}@{start}"] = flat[start:stop].clone()
            free -= (stop - start) * flat.element_size()
            pieces.append([f"{writer}-{number:03d}.safetensors", start])
            start = stop
        index[name] = {
            "dtype": str(flat.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "pieces": pieces,
        }
    flush()
    write_json(folder / index_name(writer), index)


def indexes(folder: Path) -> list[str]:
    """File names of the indexes in a folder, one for each writer."""
    return sorted(file.name for file in folder.glob(index_name("*")))


def check_indexes(folder: Path, expected: Iterable[str]) -> None:
    """Refuse a folder that was not copied as a whole: what an index names would go unnoticed.

    Raises:
        AttnEditError: naming the first one that is missing.
    """
    for name in expected:
        if not (folder / name).is_file():
            fix = "copy it again, or resume from an older checkpoint"
            raise AttnEditError(str(folder / name), "missing", fix)


class PartsReader:
    """Tensors of a folder of parts, by name.

    Args:
        folder: of the parts.
        writers: whose tensors are wanted: the start of their names.

    Raises:
        AttnEditError: if a file that an index names is missing or damaged. Which indexes there must
            be is for :func:`check_indexes`.
    """

    def __init__(self, folder: Path, writers: str = "") -> None:
        self.folder = folder
        self._index: dict[str, Any] = {}
        for file in sorted(folder.glob(index_name(f"{writers}*"))):
            self._index |= read_json(file, "checkpoint")

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self._index[name]["shape"])

    def load(self, name: str) -> Tensor:
        """One tensor, on the CPU, as it was written."""
        about = self._index[name]
        pieces = []
        for file, start in about["pieces"]:
            try:
                with safe_open(self.folder / file, framework="pt") as part:
                    pieces.append(part.get_tensor(f"{name}@{start}"))
            except (FileNotFoundError, SafetensorError) as error:
                fix = "copy the file again, or resume from an older checkpoint"
                raise AttnEditError(str(self.folder / file), error, fix) from error
        tensor: Tensor = torch.cat(pieces).view(about["shape"])
        return tensor
