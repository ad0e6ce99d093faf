"""The schema: what it accepts, what it refuses and in which words, and that it survives saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from vllm.config.utils import normalize_value

from tests.unit.tiny import FAMILY_NAMES, tiny_config, tiny_edit
from vllm_attnedit import AttnEditError
from vllm_attnedit.config import FULL, LATENT, SLIDING, AttentionEdit, AttnEditConfig


def edited_config(family: str, edit: AttentionEdit | dict | None = None, **kw) -> AttnEditConfig:
    fields = tiny_config(family).to_dict()
    edit = edit if edit is not None else tiny_edit()
    return AttnEditConfig(base_model_type=family, attention_edit=edit, **fields, **kw)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_round_trip_through_save_pretrained(family: str, target: str, tmp_path: Path):
    config = edited_config(
        family, tiny_edit(target), provenance={"teacher": "tiny", "stage": "edit"}
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is AttnEditConfig
    assert loaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert loaded.edit == config.edit

    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "attnedit"
    assert stored["architectures"] == ["AttnEditForCausalLM"]
    assert stored["base_model_type"] == family
    assert stored["attention_edit"]["version"] == 1
    assert stored["hidden_size"] == 128
    # What follows from the edit is not stored beside it, where it could contradict it.
    assert "layer_types" not in stored
    assert "sliding_window" not in stored


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_teacher_config_is_the_teachers(family: str):
    teacher = tiny_config(family)
    rebuilt = edited_config(family).teacher_config()
    assert type(rebuilt) is type(teacher)
    ignored = {"transformers_version", "architectures", "dtype", "head_dim"}
    expected = {k: v for k, v in teacher.to_dict().items() if k not in ignored}
    actual = {k: v for k, v in rebuilt.to_dict().items() if k not in ignored}
    assert actual == expected


def test_latent_layers_look_full_to_caches():
    config = edited_config("qwen3", tiny_edit("mla"))
    assert config.layer_types == [FULL] * 4
    assert config.sliding_window is None
    config = edited_config("qwen3", tiny_edit("gateswa", window=8))
    assert config.layer_types == [SLIDING] * 3 + [FULL]
    assert config.sliding_window == 8


def test_the_window_cannot_be_changed_behind_the_edit():
    with pytest.raises(AttnEditError, match=r"sliding_window: 64: .* edit the teacher again"):
        edited_config("qwen3").update({"sliding_window": 64})


def test_compiled_code_is_cached_by_every_field():
    """vLLM's hash of a model: nothing but where the weights came from may be left out."""

    def key(config: AttnEditConfig) -> str:
        return str(normalize_value(config))

    base = key(edited_config("qwen3"))
    assert key(edited_config("qwen3", provenance={"stage": "stage2"})) == base
    others = [
        edited_config("qwen3", tiny_edit(window=9)),
        edited_config("qwen3", tiny_edit(gate="elementwise")),
        edited_config("qwen3", tiny_edit("mla")),
        edited_config("llama"),
    ]
    fields = tiny_config("qwen3").to_dict() | {"rms_norm_eps": 1e-3}
    others.append(AttnEditConfig("qwen3", tiny_edit(), **fields))
    assert len({base, *map(key, others)}) == 1 + len(others)


def test_a_provenance_that_is_no_object_is_refused():
    with pytest.raises(AttnEditError, match="provenance: x: give an object"):
        edited_config("qwen3", provenance="x")


@pytest.mark.parametrize(
    ("family", "qkv", "o"),
    [("llama", False, False), ("qwen2", True, False), ("qwen3", False, False)],
)
def test_biases_follow_the_family(family: str, qkv: bool, o: bool):
    config = edited_config(family)
    assert (config.qkv_bias, config.o_bias) == (qkv, o)


@pytest.mark.parametrize(("gate", "size"), [(None, 0), ("headwise", 4), ("elementwise", 128)])
def test_gate_size(gate: str | None, size: int):
    assert edited_config("qwen3", tiny_edit(gate=gate)).gate_size == size


SWA = {"layer_types": [SLIDING] * 3 + [FULL], "sliding_window": 8}
MLA = tiny_edit("mla").to_dict()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({**SWA, "sliding_window": 0}, "attention_edit.sliding_window: 0: give an integer >= 1"),
        ({**SWA, "sliding_window": True}, "attention_edit.sliding_window: True: give an integer"),
        ({"layer_types": [SLIDING] * 4}, "attention_edit.sliding_window: None: give an integer"),
        (
            {"layer_types": [FULL] * 4, "sliding_window": 8},
            "attention_edit.sliding_window: 8: leave",
        ),
        (
            {**SWA, "gate": "both"},
            "attention_edit.gate: both: use 'headwise', 'elementwise' or null",
        ),
        ({**SWA, "layer_types": [SLIDING] * 3}, "layer_types: 3 entries: give 4, one per layer"),
        ({**SWA, "layer_types": ["window"] * 4}, "attention_edit.layer_types: window: use one of"),
        ({**SWA, "layer_types": []}, "attention_edit.layer_types"),
        ({"sliding_window": 8}, "attention_edit.layer_types: None: give one type per layer"),
        ({**SWA, "windows": 3}, "attention_edit: windows: remove this field; known are"),
        ({**SWA, "version": 2, "new": 1}, "attention_edit.version: 2: upgrade vllm-attnedit"),
        ({**SWA, "kv_lora_rank": 8}, "attention_edit.kv_lora_rank: 8: leave it out"),
        ({**MLA, "kv_lora_rank": None}, "attention_edit.kv_lora_rank: None: give an integer >= 1"),
        ({**MLA, "qk_rope_head_dim": 15}, "attention_edit.qk_rope_head_dim: 15: give an even"),
        ({**MLA, "v_head_dim": 16}, "attention_edit.v_head_dim: 16: use 32: 4 heads x v_head_dim"),
        ({**SWA, "q_lora_rank": 8}, "attention_edit.q_lora_rank: 8: leave it out"),
        ({**SWA, "qk_norm": "per_head"}, "attention_edit.qk_norm: per_head: leave it out"),
        ({**MLA, "qk_norm": "both"}, "attention_edit.qk_norm: both: use 'per_head' or leave it"),
        (
            {**MLA, "qk_norm": "per_head", "kv_lora_rank": 15},
            "attention_edit.kv_lora_rank: 15: give an even rank",
        ),
        ("gateswa", "attention_edit: gateswa: give an object"),
    ],
)
def test_bad_edits_are_refused_in_one_line(edit, message: str):
    with pytest.raises(AttnEditError) as caught:
        edited_config("qwen3", edit)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_family_is_refused():
    with pytest.raises(AttnEditError, match=r"base_model_type: gpt2: use a teacher of a supported"):
        AttnEditConfig(base_model_type="gpt2")


def test_the_default_edit_is_the_teacher():
    config = AttnEditConfig(base_model_type="llama")
    assert set(config.layer_types) == {FULL}
    assert config.gate_size == 0


@settings(max_examples=50, deadline=None)
@given(
    types=st.lists(st.sampled_from([FULL, SLIDING, LATENT]), min_size=1, max_size=12),
    window=st.integers(1, 5000),
    gate=st.sampled_from(["headwise", "elementwise", None]),
)
def test_edits_round_trip(types: list[str], window: int, gate: str | None):
    fields: dict = {"layer_types": types, "gate": gate}
    if SLIDING in types:
        fields["sliding_window"] = window
    if LATENT in types:
        fields |= {k: MLA[k] for k in ("kv_lora_rank", "qk_nope_head_dim")}
        fields |= {k: MLA[k] for k in ("qk_rope_head_dim", "v_head_dim")}
    edit = AttentionEdit.from_dict(fields)
    assert AttentionEdit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit
