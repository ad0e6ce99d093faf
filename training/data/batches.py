"""Batches of packed sequences, made ahead of time in a thread of their own.

Shapes: B sequences, T tokens, N positions that count in the loss (padded).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.data.packing import PackedSequences, Sequence

_NEARLY_ALL = 0.9
_PADDED = 64
"""Document counts are padded to a multiple, so that compiled code sees few shapes."""


@dataclass(frozen=True)
class Batch:
    """One forward pass of one device.

    Attributes:
        input_ids: (B, T) int64.
        position_ids: (B, T) int64; every document starts at 0.
        documents: (B, T) int32; counted from 0 in each sequence.
        cu_seqlens: (D + 1,) int32, ends of the documents in the flattened batch, starting with 0;
            padded with empty documents at the end.
        max_length: no document is longer: T. The longest one's length would change from batch to
            batch, and compiled code with it.
        loss_index: (N,) int64, flattened positions that the loss looks at; ``None`` for all.
        loss_weight: (N,) float32, 1 where the *next* token is learned, 0 elsewhere.
        loss_tokens: positions that count.
        sequences: numbers of the sequences in the order of the run.
    """

    input_ids: Tensor
    position_ids: Tensor
    documents: Tensor
    cu_seqlens: Tensor
    max_length: int
    loss_index: Tensor | None
    loss_weight: Tensor
    loss_tokens: int
    sequences: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    def pick(self, values: Tensor) -> Tensor:
        """The rows (N, ...) of flattened values (B T, ...) that the loss looks at."""
        return values if self.loss_index is None else values.index_select(0, self.loss_index)

    def to(self, device: torch.device) -> Batch:
        """On another device; from pinned memory without waiting."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def pinned(self) -> Batch:
        """In page-locked memory, for copies that run beside computation."""
        moved: dict[str, Any] = {
            name: value.pin_memory()
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def make_batch(
    sequences: list[Sequence], numbers: tuple[int, ...], *, answers_only: bool, chunk: int = 1
) -> Batch:
    """Stack sequences.

    Args:
        sequences: of one length.
        numbers: of the sequences.
        answers_only: learn the next token only where it is an answer's.
        chunk: the number of loss positions is padded to a multiple of it.

    A position counts if its next token lies in the same document of the same sequence.
    """
    ids = np.stack([s.ids for s in sequences])
    documents = np.stack([s.documents for s in sequences])
    rows, length = ids.shape
    starts = np.ones((rows, length), dtype=bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = np.arange(length)
    positions = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)

    counts = np.zeros((rows, length), dtype=bool)
    counts[:, :-1] = ~starts[:, 1:]
    if answers_only:
        counts[:, :-1] &= np.stack([s.answers for s in sequences])[:, 1:]
    index, weight = _loss_positions(counts.ravel(), chunk)

    bounds = np.append(np.flatnonzero(starts), rows * length)
    ends = np.full(-(-len(bounds) // _PADDED) * _PADDED, rows * length, dtype=np.int32)
    ends[: len(bounds)] = bounds
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        documents=torch.from_numpy(documents),
        cu_seqlens=torch.from_numpy(ends),
        max_length=length,
        loss_index=None if index is None else torch.from_numpy(index),
        loss_weight=torch.from_numpy(weight),
        loss_tokens=int(counts.sum()),
        sequences=numbers,
    )


def _loss_positions(counts: np.ndarray, chunk: int) -> tuple[np.ndarray | None, np.ndarray]:
    """Positions that the loss looks at and their weights, a whole number of chunks where possible.

    If nearly all count, all are taken: a zero weight costs less than gathering. Otherwise those
    that count are, filled up with others, each once, since adding up gradients of repeated
    positions in a fixed order is slow on a GPU.
    """
    used, unused = np.flatnonzero(counts), np.flatnonzero(~counts)
    if len(used) >= _NEARLY_ALL * len(counts):
        return None, counts.astype(np.float32)
    fill = min(chunk if not len(used) else -len(used) % chunk, len(unused))
    weight = np.zeros(len(used) + fill, dtype=np.float32)
    weight[: len(used)] = 1
    return np.concatenate([used, unused[:fill]]), weight


class BatchStream:
    """The micro-batches of each step for one rank, prepared one step ahead.

    Step ``s`` takes sequences ``s * batch`` to ``(s + 1) * batch``: micro-batch ``m`` of rank ``r``
    is the ``(m * ranks + r)``-th group of ``micro`` of them. So the step does not depend on how
    many devices share it.

    Args:
        data: the sequences.
        batch: sequences of a step.
        micro: sequences of a micro-batch.
        rank: of this process.
        ranks: that share a step.
        answers_only: as in :func:`make_batch`, as is ``chunk``.
        pin: keep batches in page-locked memory.
    """

    def __init__(
        self,
        data: PackedSequences,
        *,
        batch: int,
        micro: int,
        rank: int = 0,
        ranks: int = 1,
        answers_only: bool = False,
        chunk: int = 1,
        pin: bool = False,
    ) -> None:
        self._data = data
        self._batch, self._micro, self._rank, self._ranks = batch, micro, rank, ranks
        self._answers_only, self._chunk, self._pin = answers_only, chunk, pin

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of one step."""
        made = []
        for start in range(self._rank * self._micro, self._batch, self._micro * self._ranks):
            first = step * self._batch + start
            numbers = tuple(range(first, first + self._micro))
            batch = make_batch(
                [self._data[i] for i in numbers],
                numbers,
                answers_only=self._answers_only,
                chunk=self._chunk,
            )
            made.append(batch.pinned() if self._pin else batch)
        return made

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """Steps ``first`` to ``last - 1``; the next one is made while the current one trains."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            pending: Future[list[Batch]] | None = (
                pool.submit(self.step, first) if first < last else None
            )
            for step in range(first, last):
                assert pending is not None
                current = pending.result()
                pending = pool.submit(self.step, step + 1) if step + 1 < last else None
                yield current
