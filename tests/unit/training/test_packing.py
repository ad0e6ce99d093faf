"""Packed sequences: every token once a pass, any place reachable, documents kept apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.batches import BatchStream, make_batch
from training.data.packing import PackedSequences, Sequence, shuffled
from training.data.shards import ShardReader, ShardWriter
from vllm_attnedit.errors import AttnEditError


def corpus(folder, lengths, answers=None):
    """Token values tell where a token comes from: all are different."""
    writer = ShardWriter(folder, 1 << 17, with_answers=answers is not None, file_tokens=50)
    start = 0
    for number, length in enumerate(lengths):
        flags = None if answers is None else answers[number]
        writer.add(np.arange(start, start + length), flags)
        start += length
    writer.close(tokenizer="x")
    return ShardReader(folder)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=3, max_size=15),
    length=st.integers(1, 12),
    seed=st.integers(0, 50),
)
def test_a_pass_sees_every_token_at_most_once_and_documents_in_order(
    tmp_path_factory, lengths, length, seed
):
    if sum(lengths) < length:
        lengths = [*lengths, length]
    reader = corpus(tmp_path_factory.mktemp("c"), lengths)
    data = PackedSequences(reader, length, seed)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    seen = []
    for index in range(data.per_pass, 2 * data.per_pass):  # the second pass
        sequence = data[index]
        seen += sequence.ids.tolist()
        for document in np.unique(sequence.documents):
            ids = sequence.ids[sequence.documents == document]
            assert (np.diff(ids) == 1).all()
            assert len(set(owner[ids])) == 1
        changes = np.diff(sequence.documents)
        assert set(changes.tolist()) <= {0, 1}
    assert len(seen) == len(set(seen)) == data.per_pass * length


def test_any_place_is_reached_directly(tmp_path):
    reader = corpus(tmp_path, [7, 30, 2, 19, 40])
    straight = PackedSequences(reader, 6, seed=3)
    everything = [straight[i].ids.tolist() for i in range(3 * straight.per_pass)]
    for index in (40, 5, 17, 0):
        assert PackedSequences(reader, 6, seed=3)[index].ids.tolist() == everything[index]
    other = PackedSequences(reader, 6, seed=4)
    assert [other[i].ids.tolist() for i in range(8)] != everything[:8]
    first, second = everything[: straight.per_pass], everything[straight.per_pass :]
    assert first != second[: straight.per_pass]


@given(count=st.integers(0, 300), key=st.lists(st.integers(0, 1 << 40), max_size=3))
def test_shuffles_are_permutations(count, key):
    assert sorted(shuffled(count, *key).tolist()) == list(range(count))


def test_shuffles_do_not_depend_on_a_library():
    # Written down once: a change would silently change the data of every resumed run.
    assert shuffled(8, 1, 2).tolist() == FROZEN


FROZEN = [6, 5, 0, 3, 7, 4, 2, 1]


def test_too_small_a_corpus_is_refused(tmp_path):
    reader = corpus(tmp_path, [10, 10])
    with pytest.raises(AttnEditError, match=r"20 tokens.*optim\.batch"):
        PackedSequences(reader, 8, seed=0, batch=4)


def sequence(documents, answers=None):
    count = len(documents)
    flags = np.ones(count, dtype=bool) if answers is None else np.asarray(answers, dtype=bool)
    return Sequence(np.arange(count), np.asarray(documents, dtype=np.int32), flags)


def test_positions_restart_and_ends_mark_documents():
    batch = make_batch(
        [sequence([0, 0, 0, 1, 1, 2]), sequence([0, 0, 0, 0, 0, 0])], (0, 1), answers_only=False
    )
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.cu_seqlens[:5].tolist() == [0, 3, 5, 6, 12]
    assert set(batch.cu_seqlens[5:].tolist()) == {12}
    assert batch.max_length == 6


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_the_loss_looks_at_next_tokens_of_the_same_document(chunk):
    answers = [1, 0, 1, 1, 0, 0]
    batch = make_batch(
        [sequence([0, 0, 0, 1, 1, 2], answers)], (0,), answers_only=True, chunk=chunk
    )
    # Position 1 predicts token 2, an answer. Token 3 is one too, but begins a document.
    assert batch.loss_tokens == 1
    assert batch.loss_index is not None
    counted = batch.loss_index[batch.loss_weight > 0]
    assert counted.tolist() == [1]
    assert len(set(batch.loss_index.tolist())) == len(batch.loss_index) == chunk
    every = make_batch([sequence([0] * 40)], (0,), answers_only=False, chunk=chunk)
    assert every.loss_index is None
    assert every.loss_tokens == 39
    assert every.loss_weight.tolist() == [1.0] * 39 + [0.0]
    assert every.pick(torch.arange(40)).tolist() == list(range(40))


def test_devices_share_out_the_same_step(tmp_path):
    reader = corpus(tmp_path, [11] * 40)
    data = PackedSequences(reader, 8, seed=1, batch=8)
    alone = BatchStream(data, batch=8, micro=2)
    whole = {n for b in alone.step(3) for n in b.sequences}
    assert whole == set(range(24, 32))
    halves = [BatchStream(data, batch=8, micro=2, rank=r, ranks=2).step(3) for r in (0, 1)]
    parts = [[n for b in half for n in b.sequences] for half in halves]
    assert len(parts[0]) == len(parts[1]) == 4
    assert set(parts[0]) | set(parts[1]) == whole


def test_the_stream_resumes_where_it_was_left(tmp_path):
    reader = corpus(tmp_path, [11] * 40)
    data = PackedSequences(reader, 8, seed=1, batch=4)

    def steps(first, last):
        stream = BatchStream(data, batch=4, micro=2)
        return [torch.cat([b.input_ids for b in s]).tolist() for s in stream.steps(first, last)]

    assert steps(0, 30)[17:] == steps(17, 30)
    assert steps(5, 5) == []
