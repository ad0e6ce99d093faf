"""Packs documents into sequences of one length, in an order that any place can be found in.

Sequence ``i`` follows from (shards, length, seed, i) alone, so a run resumes anywhere and any
number of devices sees the same order. In every pass over the data the documents are shuffled, laid
end to end and cut; then the sequences are shuffled, so that neighbours in a batch are not
neighbours in a book. What is left over at the end of a pass is dropped; the next pass leaves out
something else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.data.shards import ShardReader
from vllm_attnedit.errors import AttnEditError

_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of ``range(count)`` that depends on the key alone, (count,) int64.

    Sorts by SplitMix64 hashes (Steele, Lea, Flood 2014) and not by a library's generator, whose
    stream may change with its version.
    """
    state = np.full(1, _GOLDEN, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            state = _mix(state + np.uint64(part + 1))
        hashes = _mix(np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN) + state)
    return np.argsort(hashes, kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Sequence:
    """A packed sequence.

    Attributes:
        ids: token ids (T,) int64.
        documents: which document each token belongs to, counted from 0 in this sequence, (T,)
            int32.
        answers: whether the token is one to learn to say, (T,) bool.
    """

    ids: np.ndarray
    documents: np.ndarray
    answers: np.ndarray


class PackedSequences:
    """All sequences of a run, by number.

    Args:
        reader: the shards.
        length: tokens of a sequence, T.
        seed: of the order.
        batch: sequences of a step, for the check that there is enough text.

    Raises:
        AttnEditError: if the corpus cannot fill one batch.
    """

    def __init__(self, reader: ShardReader, length: int, seed: int, batch: int = 1) -> None:
        self.reader = reader
        self.length = length
        self.seed = seed
        self.per_pass = reader.tokens // length
        if self.per_pass < batch:
            fix = (
                f"give more text: a batch of {batch} sequences of {length} tokens needs "
                f"{batch * length:,}; or lower optim.batch or data.sequence_length"
            )
            raise AttnEditError("data.sources", f"{reader.tokens:,} tokens", fix)
        self._pass = -1
        self._documents = self._ends = self._sequences = np.empty(0, dtype=np.int64)

    def _enter(self, number: int) -> None:
        """Lay out one pass over the data."""
        if number == self._pass:
            return
        lengths = self.reader.lengths()
        self._documents = shuffled(len(lengths), self.seed, number, 0)
        self._ends = np.cumsum(lengths[self._documents])
        self._sequences = shuffled(self.per_pass, self.seed, number, 1)
        self._pass = number

    def __getitem__(self, index: int) -> Sequence:
        number, place = divmod(index, self.per_pass)
        self._enter(number)
        low = int(self._sequences[place]) * self.length
        high = low + self.length
        ids = np.empty(self.length, dtype=np.int64)
        documents = np.empty(self.length, dtype=np.int32)
        answers = np.empty(self.length, dtype=bool)
        at = int(np.searchsorted(self._ends, low, side="right"))
        filled = count = 0
        while filled < self.length:
            document = int(self._documents[at])
            end = int(self._ends[at])
            start = end - int(self.reader.offsets[document + 1] - self.reader.offsets[document])
            piece = slice(max(low, start) - start, min(high, end) - start)
            part_ids, part_answers = self.reader.read(document, piece.start, piece.stop)
            stop = filled + len(part_ids)
            ids[filled:stop], answers[filled:stop] = part_ids, part_answers
            documents[filled:stop] = count
            filled, count, at = stop, count + 1, at + 1
        return Sequence(ids, documents, answers)
