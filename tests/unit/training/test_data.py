"""Documents to shards: what counts as an answer, what identifies a corpus, what is refused."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.tiny import tiny_tokenizer
from tests.unit.training.small import write_chats, write_text
from training.config import DataConfig, SourceConfig
from training.data.chat import read_messages, tokenize_chat
from training.data.prepare import prepare_shards, tokenizer_hash
from training.data.shards import ShardReader, ShardWriter
from training.data.sources import read_source
from vllm_attnedit.errors import AttnEditError

CHAT = [
    {"role": "user", "content": "the rain"},
    {"role": "assistant", "content": "over the land"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "in anger"},
]


def source(kind, path, **more):
    return SourceConfig(kind=kind, path=str(path), **more)


def items(of):
    return [item for _, item in read_source(of, "data.sources.0")]


@pytest.mark.parametrize("said", ["he ran\n", "he ran ", " he ran"])
def test_space_around_an_answer_does_not_hide_its_end(said):
    chat = [CHAT[0], {"role": "assistant", "content": said}]
    tokenizer = tiny_tokenizer()
    ids, answers = tokenize_chat(tokenizer, chat, "here")
    assert tokenizer.decode(ids[answers].tolist()) == f"{said}<|im_end|>"


def test_answers_and_their_ends_are_marked_and_nothing_else():
    tokenizer = tiny_tokenizer()
    ids, answers = tokenize_chat(tokenizer, CHAT, "here")
    said = tokenizer.decode(ids[answers].tolist())
    assert said == "over the land<|im_end|>in anger<|im_end|>"
    assert tokenizer.decode(ids.tolist()) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_an_answer_that_repeats_the_question_is_found_behind_it():
    tokenizer = tiny_tokenizer()
    chat = [{"role": "user", "content": "rain"}, {"role": "assistant", "content": "rain"}]
    ids, answers = tokenize_chat(tokenizer, chat, "here")
    first = int(np.flatnonzero(answers)[0])
    assert "assistant" in tokenizer.decode(ids[:first].tolist())
    assert tokenizer.decode(ids[answers].tolist()) == "rain<|im_end|>"


def test_an_answer_that_the_template_rewrites_is_not_marked():
    tokenizer = tiny_tokenizer()
    # As templates do that drop the reasoning of all answers but the last.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last or message['role'] == 'user' else 'land' }}",
    )
    ids, answers = tokenize_chat(tokenizer, CHAT, "here")
    assert tokenizer.decode(ids[answers].tolist()) == "in anger<|im_end|>"
    # Nor are the same words where somebody else says them.
    ids, answers = tokenize_chat(tokenizer, [*CHAT[:2], CHAT[1] | {"role": "user"}, CHAT[3]], "x")
    assert tokenizer.decode(ids[answers].tolist()) == "in anger<|im_end|>"


def test_both_spellings_of_conversations():
    values = [{"from": "gpt", "value": "lost"}, {"from": "human", "value": "hi"}]
    values += [{"from": "gpt", "value": "ho"}, {"from": "observer", "value": "x"}]
    expected = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert read_messages({"conversations": values}, None, "here") == expected
    assert read_messages({"messages": expected}, None, "here") == expected
    assert read_messages({"turns": expected}, "turns", "here") == expected
    assert read_messages({"messages": expected[:1]}, None, "here") == []
    with pytest.raises(AttnEditError, match="column"):
        read_messages({"text": "no chat"}, None, "here")


def test_text_in_all_its_containers(tmp_path):
    (tmp_path / "a.txt").write_text("one\n---\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    (tmp_path / "c.json").write_text(json.dumps([{"text": "five"}, "six"]))
    (tmp_path / "d.bin").write_text("ignored")
    found = items(source("text", tmp_path, separator="\n---\n"))
    assert found == ["one", "two", "three", "four", "five", "six"]
    globbed = items(source("text", tmp_path / "*.jsonl"))
    assert globbed == ["three", "four"]
    (tmp_path / "e.jsonl").write_text('{"body": "seven"}\n')
    assert items(source("text", tmp_path / "e.jsonl", column="body")) == ["seven"]
    with pytest.raises(AttnEditError, match="column"):
        items(source("text", tmp_path / "e.jsonl"))
    (tmp_path / "f.jsonl").write_text("{broken\n")
    with pytest.raises(AttnEditError, match=r"f\.jsonl"):
        items(source("text", tmp_path / "f.jsonl"))


def test_records_that_are_lists_are_lines_or_an_array(tmp_path):
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(CHAT[i:]) for i in (0, 2)) + "\n")
    (tmp_path / "array.json").write_text(json.dumps([CHAT, CHAT[2:]], indent=1))
    (tmp_path / "one.json").write_text(json.dumps([CHAT, CHAT[2:]]) + "\n")
    for name in ("lines.jsonl", "array.json", "one.json"):
        assert items(source("chat", tmp_path / name)) == [CHAT, CHAT[2:]]


def test_a_record_without_text_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one"}\n{"text": null}\n{"text": null, "content": "two"}\n'
    )
    assert [i for i in items(source("text", tmp_path / "a.jsonl")) if i] == ["one", "two"]


def test_what_the_teacher_wrote_is_json_whatever_its_name(tmp_path):
    (tmp_path / "teacher.txt").write_text('{"text": "one", "seed": 0}\n')
    assert items(source("teacher", tmp_path / "teacher.txt")) == ["one"]


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    chats = [{"messages": CHAT}, {"messages": [{"role": "system", "content": "be"}, *CHAT]}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, chats)))
    data = DataConfig(sources=[source("chat", tmp_path / "c.jsonl")])
    with pytest.raises(AttnEditError, match=r"c\.jsonl, record 2: no system"):
        prepare_shards(data, tmp_path / "shards", tokenizer)


@pytest.mark.parametrize("path", ["docs", "docs/*/index.rst"])
def test_files_of_one_name_are_told_apart(tmp_path, path):
    for name in ("a", "b"):
        write_text(tmp_path / "docs" / name / "index.rst", 60, seed=ord(name))
    data = DataConfig(sources=[source("text", tmp_path / path)])
    prepare_shards(data, tmp_path / "shards", tiny_tokenizer())
    write_text(tmp_path / "docs/a/index.rst", 60, seed=7)
    with pytest.raises(AttnEditError, match="other sources"):
        prepare_shards(data, tmp_path / "shards", tiny_tokenizer())


def test_shards_take_nobodys_place(tmp_path):
    """A folder with other things in it, the sources for instance, is not theirs."""
    text = write_text(tmp_path / "data" / "text" / "t.txt", 60)
    data = DataConfig(sources=[source("text", text)])
    with pytest.raises(AttnEditError, match=r"data: name a new or an empty folder"):
        prepare_shards(data, tmp_path / "data", tiny_tokenizer())
    assert text.is_file()
    (tmp_path / "empty").mkdir()
    assert prepare_shards(data, tmp_path / "empty", tiny_tokenizer()).tokens


def test_a_hub_that_breaks_off_is_named(tmp_path, monkeypatch):
    def rows(*_, **__):
        yield {"text": "one"}
        raise httpx.ReadTimeout("The read operation timed out")

    monkeypatch.setattr("datasets.load_dataset", rows)
    data = DataConfig(sources=[source("hub", "some/set")])
    with pytest.raises(AttnEditError, match=r"sources\.0\.path: some/set: .* after 1 rows"):
        prepare_shards(data, tmp_path / "shards", tiny_tokenizer())
    assert not any(tmp_path.iterdir())


def test_hub_source_of_a_local_folder(tmp_path):
    data = tmp_path / "set"
    data.mkdir()
    (data / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert items(source("hub", data)) == ["one", "two"]
    with pytest.raises(AttnEditError, match="text"):
        items(source("hub", data, column="body"))
    with pytest.raises(AttnEditError, match=r"data\.sources\.0\.path"):
        items(source("hub", tmp_path / "nothing"))


def test_shards_hold_the_documents(tmp_path):
    tokenizer = tiny_tokenizer()
    texts, chats = write_text(tmp_path / "t.txt", 400), write_chats(tmp_path / "c.jsonl", 5)
    data = DataConfig(sources=[source("text", texts, separator="\n\n"), source("chat", chats)])
    reader = prepare_shards(data, tmp_path / "shards", tokenizer)
    documents = texts.read_text().split("\n\n")
    for number, text in enumerate(documents):
        ids, answers = reader.read(number, 0, int(reader.lengths()[number]))
        assert tokenizer.decode(ids.tolist()) == text + tokenizer.eos_token
        assert answers.all()
    for number, line in enumerate(chats.read_text().splitlines()):
        expected_ids, expected = tokenize_chat(tokenizer, json.loads(line)["messages"], "here")
        ids, answers = reader.read(len(documents) + number, 0, len(expected_ids))
        assert (ids == expected_ids).all()
        assert (answers == expected).all()
    manifest = reader.manifest
    assert manifest["tokens"] == reader.lengths().sum()
    assert manifest["dtype"] == "uint16"
    assert 0 < manifest["answer_tokens"] < manifest["tokens"]
    assert [s["documents"] for s in manifest["sources"]] == [len(documents), 5]


def test_long_texts_are_cut_into_blocks_without_losing_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.prepare._BLOCK_CHARACTERS", 40)
    tokenizer, text = tiny_tokenizer(), "in the land\n\n\nand so on " * 30
    (tmp_path / "t.txt").write_text(text)
    reader = prepare_shards(
        DataConfig(sources=[source("text", tmp_path / "t.txt")]), tmp_path / "shards", tokenizer
    )
    ids, _ = reader.read(0, 0, reader.tokens)
    assert tokenizer.decode(ids.tolist()) == text + tokenizer.eos_token
    assert reader.manifest["documents"] == 1


def test_a_source_without_text_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text(" \n\n ")
    data = DataConfig(sources=[source("text", tmp_path / "t.txt")])
    with pytest.raises(AttnEditError, match=r"data\.sources\.0\.path.*no text"):
        prepare_shards(data, tmp_path / "shards", tiny_tokenizer())
    assert not (tmp_path / "shards").exists()


def test_max_tokens_stops_a_source(tmp_path):
    text = write_text(tmp_path / "t.txt", 400)
    data = DataConfig(sources=[source("text", text, separator="\n\n", max_tokens=100)])
    assert prepare_shards(data, tmp_path / "shards", tiny_tokenizer()).tokens == 100


def test_same_sources_are_tokenised_once_and_others_refused(tmp_path, monkeypatch):
    tokenizer, text = tiny_tokenizer(), write_text(tmp_path / "t.txt", 200)
    data = DataConfig(sources=[source("text", text)])
    first = prepare_shards(data, tmp_path / "shards", tokenizer).hash
    monkeypatch.setattr("training.data.prepare._write", None)  # must not be called again
    assert prepare_shards(data, tmp_path / "shards", tokenizer).hash == first
    assert prepare_shards(DataConfig(), tmp_path / "shards", tokenizer).hash == first
    write_text(text, 200, seed=1)
    with pytest.raises(AttnEditError, match="other sources"):
        prepare_shards(data, tmp_path / "shards", tokenizer)
    with pytest.raises(AttnEditError, match=r"data\.sources"):
        prepare_shards(DataConfig(), tmp_path / "nothing", tokenizer)


def test_another_tokenizer_is_refused(tmp_path):
    text = write_text(tmp_path / "t.txt", 200)
    data = DataConfig(sources=[source("text", text)])
    prepare_shards(data, tmp_path / "shards", tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["thunder"])
    assert tokenizer_hash(other) != tokenizer_hash(tiny_tokenizer())
    with pytest.raises(AttnEditError, match="tokenizer"):
        prepare_shards(DataConfig(), tmp_path / "shards", other)


def test_a_cut_off_shard_is_refused(tmp_path):
    data = DataConfig(sources=[source("text", write_text(tmp_path / "t.txt", 200))])
    prepare_shards(data, tmp_path / "shards", tiny_tokenizer())
    tokens = tmp_path / "shards" / "tokens-00000.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(AttnEditError, match="cut off"):
        ShardReader(tmp_path / "shards")


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    file_tokens=st.integers(1, 60),
    seed=st.integers(0, 99),
    wide=st.booleans(),
)
def test_documents_survive_any_cut_into_files(tmp_path_factory, lengths, file_tokens, seed, wide):
    folder = tmp_path_factory.mktemp("shards")
    draw = np.random.default_rng(seed)
    vocabulary = 100_000 if wide else 500
    documents = [(draw.integers(0, vocabulary, n), draw.random(n) < 0.5) for n in lengths]
    writer = ShardWriter(folder, vocabulary, with_answers=True, file_tokens=file_tokens)
    for ids, answers in documents:
        writer.add(ids, answers)
    writer.close(tokenizer="x")
    reader = ShardReader(folder)
    for number, (ids, answers) in enumerate(documents):
        start = int(draw.integers(0, len(ids)))
        found_ids, found_answers = reader.read(number, start, len(ids))
        assert (found_ids == ids[start:]).all()
        assert (found_answers == answers[start:]).all()
