"""Which layers and dims an edit gets by default, and which wishes are refused."""

from __future__ import annotations

import pytest

from tests.unit.tiny import tiny_config
from vllm_attnedit.config import FULL, LATENT, SLIDING
from vllm_attnedit.edit import EditPlan, parse_full_layers
from vllm_attnedit.edit.patterns import build_edit, default_full_layers
from vllm_attnedit.errors import AttnEditError

QWEN3_8B = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
QWEN3_8B |= {"head_dim": 128, "hidden_size": 4096}
QWEN3_30B = {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
QWEN3_30B |= {"head_dim": 128, "hidden_size": 2048}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (36, (5, 11, 17, 23, 29, 35)),
        (48, (5, 11, 17, 23, 29, 35, 41, 47)),
        (28, (5, 11, 17, 23)),
        (6, (5,)),
        (5, (4,)),
        (1, (0,)),
    ],
)
def test_every_sixth_layer_is_full(layers, expected):
    assert default_full_layers(layers) == expected


def test_gateswa_defaults():
    edit = build_edit(EditPlan(target="gateswa"), tiny_config("qwen3", **QWEN3_8B))
    assert edit.layer_types.count(FULL) == 6
    assert edit.layer_types[:6] == (SLIDING,) * 5 + (FULL,)
    assert (edit.sliding_window, edit.gate) == (128, "headwise")


@pytest.mark.parametrize(
    ("family", "dims"), [("qwen3", QWEN3_8B), ("qwen3_moe", QWEN3_30B)], ids=["8b", "30b-a3b"]
)
def test_mla_is_512_and_64_wide_on_both_of_the_papers_teachers(family, dims):
    edit = build_edit(EditPlan(target="mla"), tiny_config(family, **dims))
    assert set(edit.layer_types) == {LATENT}
    assert (edit.kv_lora_rank, edit.qk_rope_head_dim) == (512, 64)
    assert (edit.qk_nope_head_dim, edit.v_head_dim, edit.q_lora_rank) == (128, 128, None)
    assert edit.gate is None


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (8, 1, 64), (4, 4, 256)])
def test_mla_never_holds_more_than_the_teacher(heads, kv_heads, width):
    config = tiny_config(
        "llama",
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
    )
    edit = build_edit(EditPlan(target="mla"), config)
    assert edit.kv_lora_rank
    assert edit.qk_rope_head_dim
    assert edit.kv_lora_rank + edit.qk_rope_head_dim <= 2 * kv_heads * width


def test_all_layers_full_leave_no_window():
    plan = EditPlan(target="gateswa", full_layers=(0, 1, 2, 3))
    edit = build_edit(plan, tiny_config())
    assert edit.layer_types == (FULL,) * 4
    assert edit.sliding_window is None


@pytest.mark.parametrize("text", ["", " ", ",", ", ,"])
def test_full_layers_must_not_be_empty(text):
    with pytest.raises(AttnEditError, match=r"--full-layers.*name at least one layer"):
        parse_full_layers(text)


def test_full_layers_are_integers():
    assert parse_full_layers("5, 11,17") == (5, 11, 17)
    with pytest.raises(AttnEditError, match=r"--full-layers: 5;6: give layer indices"):
        parse_full_layers("5;6")


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"target": "gateswa", "full_layers": (4,)}, r"--full-layers: 4: .*use 0 to 3"),
        ({"target": "gateswa", "full_layers": (-1,)}, r"--full-layers: -1: .*use 0 to 3"),
        (
            {"target": "gateswa", "full_layers": (1, 2, 1)},
            r"--full-layers: 1: name each layer once",
        ),
        ({"target": "gateswa", "full_layers": ()}, r"--full-layers: \[\]: name at least one"),
        ({"target": "gateswa", "window": 0}, r"--window: 0: give an integer >= 1"),
        ({"target": "gateswa", "kv_lora_rank": 8}, r"--kv-lora-rank: 8: .*--target mla"),
        ({"target": "mla", "window": 8}, r"--window: 8: .*--target gateswa"),
        ({"target": "mla", "full_layers": (1,)}, r"--full-layers: .*--target gateswa"),
        ({"target": "mla", "kv_lora_rank": 0}, r"--kv-lora-rank: 0: give an integer >= 1"),
        ({"target": "mla", "kv_lora_rank": 129}, r"--kv-lora-rank: 129: use at most 128"),
        ({"target": "mla", "q_lora_rank": 129}, r"--q-lora-rank: 129: use at most 128"),
        ({"target": "mla", "qk_rope_head_dim": 7}, r"--qk-rope-head-dim: 7: give an even width"),
        ({"target": "mla", "qk_rope_head_dim": 34}, r"--qk-rope-head-dim: 34: use at most 32"),
        ({"target": "mla", "v_head_dim": 16}, r"--v-head-dim: 16: use 32: o_proj is the teacher's"),
        ({"target": "swa"}, r"--target: swa: use gateswa or mla"),
        ({"target": "mla", "init": "copy"}, r"--init: copy: use inherit or random"),
        ({"target": "mla", "gate": "tanh"}, r"--gate: tanh: use headwise, elementwise or none"),
        ({"target": "mla", "dtype": "int8"}, r"--dtype: int8: use bfloat16, float16 or float32"),
    ],
)
def test_wishes_that_do_not_fit(wish, message):
    with pytest.raises(AttnEditError, match=message):
        build_edit(EditPlan(**wish), tiny_config())


def test_random_latents_may_be_wider_than_what_the_teacher_has():
    plan = EditPlan(target="mla", init="random", kv_lora_rank=512, qk_rope_head_dim=64)
    assert build_edit(plan, tiny_config()).kv_lora_rank == 512


def test_longrope_has_factors_for_one_width():
    fields = QWEN3_8B | {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
        },
    }  # fmt: skip
    config = tiny_config("qwen3", **fields)
    with pytest.raises(AttnEditError, match=r"--qk-rope-head-dim: 64: use 128"):
        build_edit(EditPlan(target="mla"), config)
    assert build_edit(EditPlan(target="mla", qk_rope_head_dim=128), config).qk_rope_head_dim == 128
