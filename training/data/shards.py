"""Tokenised text on disk: memory-mapped files that are written once and read at any place.

A folder holds ``tokens-NNNNN.bin`` (uint16 or uint32, little endian), ``answers-NNNNN.bin`` (one
bit a token, only if some source is a chat), ``offsets.bin`` (int64: where each document starts, and
the end) and ``manifest.json``. No document crosses a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.files import digest, read_json, sha256_of, write_json
from vllm_attnedit.errors import AttnEditError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
FILE_TOKENS = 1 << 26


class ShardWriter:
    """Appends documents. Nothing can be read before :meth:`close` has written the manifest."""

    def __init__(
        self, folder: Path, vocab_size: int, with_answers: bool, file_tokens: int = FILE_TOKENS
    ) -> None:
        self.folder = folder
        self.dtype = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
        self.with_answers = with_answers
        self.file_tokens = file_tokens
        self.offsets = [0]
        self.answer_tokens = 0
        self._files: list[int] = []
        """First token of each finished file, and of the one being filled."""
        self._tokens: list[np.ndarray] = []
        self._answers: list[np.ndarray] = []
        self._held = 0

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    def add(self, ids: np.ndarray, answers: np.ndarray | None) -> None:
        """Append a document: ids (T,), and which of them count as answers (T,); None: all."""
        if not len(ids):
            return
        if self._held and self._held + len(ids) > self.file_tokens:
            self._flush()
        self._tokens.append(ids.astype(self.dtype))
        flags = np.ones(len(ids), dtype=bool) if answers is None else answers
        self.answer_tokens += int(flags.sum())
        if self.with_answers:
            self._answers.append(flags)
        self._held += len(ids)
        self.offsets.append(self.offsets[-1] + len(ids))

    def _flush(self) -> None:
        if not self._held:
            return
        number = len(self._files)
        _write(self.folder / f"tokens-{number:05d}.bin", np.concatenate(self._tokens))
        if self.with_answers:
            bits = np.packbits(np.concatenate(self._answers))
            _write(self.folder / f"answers-{number:05d}.bin", bits)
        self._files.append(self.tokens - self._held)
        self._tokens, self._answers, self._held = [], [], 0

    def close(self, **about: Any) -> dict[str, Any]:
        """Write what is left and the manifest.

        Args:
            **about: what else the manifest says (tokenizer, sources).

        Returns:
            The manifest.
        """
        self._flush()
        _write(self.folder / "offsets.bin", np.asarray(self.offsets, dtype="<i8"))
        files = {file.name: sha256_of(file) for file in sorted(self.folder.glob("*.bin"))}
        manifest: dict[str, Any] = {
            "version": FORMAT_VERSION,
            "dtype": self.dtype.name,
            "tokens": self.tokens,
            "answer_tokens": self.answer_tokens,
            "documents": len(self.offsets) - 1,
            "with_answers": self.with_answers,
            "file_starts": self._files,
            "files": files,
            **about,
        }
        manifest["hash"] = digest({"files": files, "tokenizer": about.get("tokenizer")})
        write_json(self.folder / MANIFEST, manifest)
        return manifest


def _write(path: Path, values: np.ndarray) -> None:
    # Not tofile, which keeps the system's reason for a failure to itself.
    with path.open("wb") as file:
        file.write(values.data)


class ShardReader:
    """Documents by index, straight from the mapped files.

    Raises:
        AttnEditError: if the folder holds no complete shards, or files of another size than
            written.
    """

    def __init__(self, folder: Path, field: str = "data.shards") -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = read_json(folder / MANIFEST, field)
        if self.manifest.get("version") != FORMAT_VERSION:
            fix = f"make the shards again: this program reads version {FORMAT_VERSION}"
            raise AttnEditError(f"{field} version", self.manifest.get("version"), fix)
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self.starts = np.asarray(self.manifest["file_starts"], dtype=np.int64)
        self.offsets = self._map("offsets.bin", np.dtype("<i8"), self.manifest["documents"] + 1)
        ends = [*self.starts[1:].tolist(), self.manifest["tokens"]]
        self._tokens, self._answers = [], []
        for number, (start, end) in enumerate(zip(self.starts.tolist(), ends)):
            self._tokens.append(self._map(f"tokens-{number:05d}.bin", dtype, end - start))
            if self.manifest["with_answers"]:
                nbytes = -(-(end - start) // 8)
                self._answers.append(self._map(f"answers-{number:05d}.bin", np.dtype("u1"), nbytes))

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
            raise AttnEditError(str(path), "missing or cut off", "copy or make the shards again")
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,))

    @property
    def tokens(self) -> int:
        return int(self.manifest["tokens"])

    @property
    def hash(self) -> str:
        return str(self.manifest["hash"])

    def lengths(self) -> np.ndarray:
        """Tokens of every document, (documents,) int64."""
        return np.diff(self.offsets)

    def read(self, document: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and answer flags of tokens ``start`` to ``end`` of a document."""
        first = int(self.offsets[document])
        file = int(np.searchsorted(self.starts, first, side="right")) - 1
        low = first - int(self.starts[file]) + start
        high = low + end - start
        ids = np.asarray(self._tokens[file][low:high], dtype=np.int64)
        if not self._answers:
            return ids, np.ones(len(ids), dtype=bool)
        bits = np.unpackbits(np.asarray(self._answers[file][low // 8 : -(-high // 8)]))
        return ids, bits[low % 8 : low % 8 + len(ids)].astype(bool)
