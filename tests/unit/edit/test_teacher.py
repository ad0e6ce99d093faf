"""Teachers: where they are found, what is copied beside the weights, which are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from tests.unit.tiny import tiny_teacher
from vllm_attnedit.edit import EditPlan, edit_checkpoint
from vllm_attnedit.edit.layout import check_tensors, teacher_tensors
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.edit.teacher import open_teacher
from vllm_attnedit.errors import AttnEditError

PLAN = EditPlan(target="gateswa", window=4)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, teacher_of):
    """A hub cache that holds ``org/tiny`` at a commit, with the network off."""
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(teacher_of("llama"), repository / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub")
    )
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_hub_id_in_the_cache_needs_no_network(hub_cache, tmp_path, revision):
    report = edit_checkpoint("org/tiny", tmp_path / "out", PLAN, revision=revision)
    provenance = report.config.provenance
    assert (provenance["teacher"], provenance["revision"]) == ("org/tiny", COMMIT)


def test_a_hub_id_that_is_nowhere(hub_cache, tmp_path):
    with pytest.raises(AttnEditError, match=r"TEACHER: org/other: .*HF_HUB_OFFLINE"):
        edit_checkpoint("org/other", tmp_path / "out", PLAN)


def test_provenance_names_a_folder_without_its_path(teacher_of, tmp_path):
    config = edit_checkpoint(teacher_of("llama"), tmp_path / "out", PLAN).config
    assert config.provenance["teacher"] == "tiny-llama"
    assert "revision" not in config.provenance
    assert config.provenance["stage"] == "edit"
    assert config.provenance["tokens_seen"] == 0
    assert {"torch", "transformers", "vllm-attnedit"} <= set(config.provenance["versions"])
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert str(teacher_of("llama").parent) not in (tmp_path / "out" / "config.json").read_text()


def test_tokenizer_template_and_generation_config_come_along(tmp_path):
    teacher = tiny_teacher("qwen2", tmp_path / "t")
    (teacher / "LICENSE").write_text("terms")
    (teacher / "additional_chat_templates").mkdir()
    (teacher / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (teacher / "README.md").write_text("not copied")
    edit_checkpoint(teacher, tmp_path / "out", PLAN)
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_bytes() == (teacher / name).read_bytes()
    assert (out / "additional_chat_templates" / "tool.jinja").read_text() == "{{ x }}"
    assert not (out / "README.md").exists()
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.temperature, generation.eos_token_id) == (0.7, [2, 0])
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_output_mirrors_the_shards_and_keeps_a_layer_together(tmp_path):
    teacher = tiny_teacher("qwen3", tmp_path / "t", max_shard_size="200KB")
    edit_checkpoint(teacher, tmp_path / "out", PLAN)
    maps = []
    for folder in (teacher, tmp_path / "out"):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        maps.append(index["weight_map"])
        stored = {n: file for file in set(maps[-1].values()) for n in load_file(folder / file)}
        assert stored == maps[-1]
    before, after = maps
    attention = "model.layers.{}.self_attn.{}_proj.weight"
    assert any(
        before[attention.format(i, "o")] != before[attention.format(i, "q")] for i in range(4)
    )
    assert set(before.values()) == set(after.values())
    for name, file in after.items():
        if ".self_attn." in name:
            layer = name.split(".self_attn.")[0]
            assert file == before[f"{layer}.self_attn.o_proj.weight"]
        else:
            assert file == before[name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_of_all_weights_and_of_the_config(teacher_of, tmp_path, dtype):
    report = edit_checkpoint(
        teacher_of("llama"), tmp_path / "out", EditPlan(target="gateswa", dtype=dtype)
    )
    assert str(report.config.dtype).endswith(dtype)
    store = SafetensorsStore(tmp_path / "out")
    assert {info.dtype for info in store.tensors.values()} == {getattr(torch, dtype)}


def edit_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3_text"}, r"model_type: gemma3_text: use a teacher of a supported"),
        ({"model_type": "attnedit"}, r"model_type: attnedit: give the unedited teacher"),
        ({"use_sliding_window": True}, r"use_sliding_window: True: use a teacher with full"),
        ({"layer_types": ["sliding_attention"] * 4}, r"layer_types: .*full attention in every"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantization_config: fp8: use the unq",
        ),
        ({"quantization_config": "gptq"}, r"quantization_config: gptq: use the unq"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, r"architectures: .*causal"),
        ({"head_dim": 64}, r"self_attn.*config\.json asks for"),
        (
            {"num_hidden_layers": 5, "layer_types": None},
            r"model\.layers\.4\..*missing from the teacher",
        ),
        (
            {"num_hidden_layers": 3, "layer_types": None},
            r"model\.layers\.3\..*unexpected in the teacher",
        ),
        ({"num_hidden_layers": 5}, r"num_hidden_layers.*layer_types"),
        ({"hidden_size": "wide"}, r"hidden_size"),
    ],
)
def test_configurations_that_cannot_be_edited(tmp_path, changes, message):
    teacher = tiny_teacher("qwen3", tmp_path / "t")
    edit_config(teacher, **changes)
    with pytest.raises(AttnEditError, match=message):
        edit_checkpoint(teacher, tmp_path / "out", PLAN)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_plain_floats_are_refused(tmp_path):
    teacher = tiny_teacher("llama", tmp_path / "t")
    tensors = load_file(teacher / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, teacher / "model.safetensors")
    with pytest.raises(AttnEditError, match=f"{name}: torch.float8_e4m3fn: use the unquantised"):
        edit_checkpoint(teacher, tmp_path / "out", PLAN)


def test_leftovers_of_old_checkpoints_are_dropped(tmp_path):
    teacher = tiny_teacher("llama", tmp_path / "t", tie_word_embeddings=True)
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, teacher / "model.safetensors")
    edit_checkpoint(teacher, tmp_path / "out", PLAN)
    kept = SafetensorsStore(tmp_path / "out").tensors
    assert "lm_head.weight" not in kept
    assert not any("rotary_emb" in name for name in kept)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    teacher = tiny_teacher("llama", tmp_path / "t", max_shard_size="700KB")
    index = teacher / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(AttnEditError, match="name files of the folder itself"):
        edit_checkpoint(teacher, tmp_path / "out", PLAN)


def test_stores_read_heads_and_the_config_describes_them(teacher_of):
    with open_teacher(teacher_of("qwen3_moe")) as teacher:
        check_tensors(teacher.store.tensors, teacher_tensors(teacher.config), "it")
        for name in ("model.norm.weight", "model.layers.1.mlp.experts.3.down_proj.weight"):
            whole = teacher.store.load(name).flatten()
            head = teacher.store.head(name, 100)
            assert 100 <= len(head) < len(whole) or len(head) == len(whole)
            assert torch.equal(head, whole[: len(head)])
