"""GGUF teachers: every tensor as the file holds it, under the names transformers uses."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.unit.edit.gguf_files import write_gguf
from tests.unit.edit.models import load, logits, tokens, windowed_logits
from tests.unit.tiny import FAMILY_NAMES, tiny_teacher
from vllm_attnedit.edit import (
    Calibration,
    EditPlan,
    apply_edit,
    edit_checkpoint,
    gguf_store,
    save_edit,
)
from vllm_attnedit.edit.gguf_store import GgufStore
from vllm_attnedit.edit.layout import check_tensors, teacher_tensors
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.errors import AttnEditError


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tensors_and_configuration(teacher_of, tmp_path, family, quantisation):
    held = write_gguf(teacher_of(family), tmp_path / "model.gguf", quantisation)
    store = GgufStore(tmp_path / "model.gguf")
    check_tensors(store.tensors, teacher_tensors(store.config), "the file")
    assert store.tensors.keys() == held.keys()
    for name, values in held.items():
        assert torch.equal(store.load(name), values), name
        head = store.head(name, 70)
        assert torch.equal(head, values.flatten()[: len(head)]), name
        assert len(head) >= min(70, values.numel())
    original = load(teacher_of(family)).config
    for field in ("head_dim", "num_key_value_heads", "rms_norm_eps", "vocab_size", "model_type"):
        assert getattr(store.config, field) == pytest.approx(getattr(original, field))
    if family == "qwen3_moe":
        assert store.config.moe_intermediate_size == original.moe_intermediate_size
        assert store.config.norm_topk_prob


def test_a_file_is_read_once_until_it_changes(teacher_of, tmp_path, monkeypatch):
    read: list[Path] = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path):
            read.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf_store, "GGUFReader", Reader)
    path = tmp_path / "model.gguf"
    held = write_gguf(teacher_of("llama"), path)
    first = GgufStore(path)
    first.config.hidden_size = 7  # one user's changes are not the next one's
    first.close()
    second = GgufStore(path)
    assert second.config.hidden_size != 7
    assert torch.equal(second.load("model.norm.weight"), held["model.norm.weight"])
    assert len(read) == 1
    write_gguf(teacher_of("qwen3"), path)
    assert GgufStore(path).config.model_type == "qwen3"
    assert len(read) == 2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_as_transformers_reads_it(teacher_of, tmp_path, family):
    write_gguf(teacher_of(family), tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    store = GgufStore(tmp_path / "model.gguf")
    state = model.state_dict()
    assert state.keys() == store.tensors.keys()
    assert all(torch.equal(store.load(name), values) for name, values in state.items())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_an_edit_from_gguf_is_a_whole_checkpoint(teacher_of, tmp_path, family):
    write_gguf(teacher_of(family), tmp_path / "model.gguf", "F16")
    plan = EditPlan(target="gateswa", window=5, dtype="float32")
    report = edit_checkpoint(tmp_path / "model.gguf", tmp_path / "out", plan)
    assert report.config.provenance["teacher"] == "model.gguf"
    ids = tokens(30)
    # F16 rounds the teacher a little.
    expected = windowed_logits(load(teacher_of(family)), ids, 5, full_layers=(3,))
    assert (logits(load(tmp_path / "out"), ids) - expected).abs().max() < 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token_id == 2
    assert (
        tokenizer("the hat").input_ids
        == AutoTokenizer.from_pretrained(teacher_of("llama"))("the hat").input_ids
    )
    assert "<|im_start|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2


def test_bfloat16_is_what_gguf_becomes_and_an_edit_of_it_can_be_saved(teacher_of, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(teacher_of("qwen2"), file)
    text = Calibration.builtin(512)
    edit_checkpoint(file, tmp_path / "out", EditPlan(target="mla"), calibration=text)
    store = SafetensorsStore(tmp_path / "out")
    assert {info.dtype for info in store.tensors.values()} == {torch.bfloat16}
    save_edit(tmp_path / "out", tmp_path / "edit")
    apply_edit(file, tmp_path / "edit", tmp_path / "again")
    again = SafetensorsStore(tmp_path / "again")
    assert all(torch.equal(store.load(n), again.load(n)) for n in store.tensors)


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_a_head_that_is_the_embedding_quantised_apart_is_tied(tmp_path, scale):
    teacher = tiny_teacher("qwen2", tmp_path / "t", tie_word_embeddings=True)
    embedding = SafetensorsStore(teacher).load("model.embed_tokens.weight")
    other = embedding + scale * embedding.std() * torch.randn(embedding.shape)
    write_gguf(teacher, tmp_path / "model.gguf", "Q4_1", head_from=other)
    store = GgufStore(tmp_path / "model.gguf")
    assert store.config.tie_word_embeddings == (scale < 1)
    assert ("lm_head.weight" in store.tensors) == (scale > 1)


def test_output_is_cut_where_the_file_is_no_guide(teacher_of, tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_attnedit.edit.assembly.SHARD_BYTES", 400_000)
    write_gguf(teacher_of("qwen3"), tmp_path / "model.gguf")
    edit_checkpoint(tmp_path / "model.gguf", tmp_path / "out", EditPlan(target="gateswa"))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 410_000 for file in files)
    assert logits(load(tmp_path / "out"), tokens(8)).isfinite().all()


def test_files_that_cannot_be_read_rightly_are_refused(tmp_path):
    def write(name: str, architecture: str, scaling: bool, factor: float = 0) -> None:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        writer.add_block_count(1)
        if scaling:
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        if factor:
            writer.add_float32(f"{architecture}.rope.scale_linear", factor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write("gemma.gguf", "gemma3", scaling=False)
    with pytest.raises(AttnEditError, match=r"^general\.architecture: gemma3: use a teacher of a"):
        GgufStore(tmp_path / "gemma.gguf")
    write("linear.gguf", "qwen3", scaling=False, factor=4)
    with pytest.raises(AttnEditError, match=r"rope scaling: linear: use the safetensors"):
        GgufStore(tmp_path / "linear.gguf")
    write("yarn.gguf", "qwen3", scaling=True)
    with pytest.raises(AttnEditError, match=r"rope scaling: yarn: use the safetensors checkpoint"):
        GgufStore(tmp_path / "yarn.gguf")
