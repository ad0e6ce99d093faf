"""``attnedit kv``: its numbers, its warnings, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from tests.unit.command import Attnedit, attnedit
from tests.unit.tiny import tiny_config, tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.cli.quantities import format_bytes, parse_bytes, parse_counts
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit.patterns import EditPlan, build_edit
from vllm_attnedit.errors import AttnEditError

__all__ = ["attnedit"]

QWEN3_8B: dict[str, Any] = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Qwen3-8B's configuration, no weights."""
    CONFIG_MAPPING["qwen3"](**QWEN3_8B).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def edited(folder: Path, target: str, **plan: Any) -> Path:
    config = CONFIG_MAPPING["qwen3"](**QWEN3_8B)
    edit = build_edit(EditPlan(target=target, **plan), config)
    AttnEditConfig("qwen3", edit, **QWEN3_8B).save_pretrained(folder)
    return folder


def report_of(attnedit: Attnedit, *arguments: object) -> dict[str, Any]:
    done = attnedit("kv", *arguments, "--json")
    assert done.code == 0, done.err
    report: dict[str, Any] = json.loads(done.out)
    return report


def test_gateswa_against_its_teacher(attnedit: Attnedit, tmp_path: Path) -> None:
    report = report_of(attnedit, edited(tmp_path / "e", "gateswa"), "--memory", "40GiB")
    full, ours = report["models"]
    assert (full["name"], ours["name"]) == ("teacher", "edited")
    assert report["base_model_type"] == "qwen3"
    assert ours["layers"] == {"sliding_attention": 30, "full_attention": 6}
    assert ours["sliding_window"] == 128
    (gpu,) = ours["per_gpu"]
    assert gpu["bytes_per_token"] == 24_576
    assert gpu["window_bytes"] == 30 * 128 * 4096
    assert gpu["reduction"] == pytest.approx(5 / 6)
    (request,) = gpu["requests"]
    assert request["length"] == 8192
    assert request["bytes"] == 24_576 * 8192 + 30 * 128 * 4096
    assert request["block_bytes"] == 24_576 * 8192 + 30 * 9 * 16 * 4096
    assert request["fit"] == 40 * 2**30 // request["block_bytes"]
    assert full["per_gpu"][0]["requests"][0]["fit"] == 35
    assert report["more_than_teacher_at_tp"] == []
    assert report["warnings"] == []


def test_table(attnedit: Attnedit, tmp_path: Path) -> None:
    folder = edited(tmp_path / "e", "gateswa")
    done = attnedit("kv", folder, "--memory", "40GiB", "--length", "8K,131072")
    assert done.code == 0
    for text in ("147,456 B", "24,576 B + 15.0 MiB -83.3%", "208.9 MiB -81.9%", "196", "131,072"):
        assert text in done.out
    assert "warning" not in done.out


def test_mla_under_tensor_parallelism_is_told_plainly(attnedit: Attnedit, tmp_path: Path) -> None:
    folder = edited(tmp_path / "e", "mla")
    report = report_of(attnedit, folder, "--tp", "1,2", "--tp", "4")
    assert report["more_than_teacher_at_tp"] == [4]
    by_tp = {gpu["tp"]: gpu for gpu in report["models"][1]["per_gpu"]}
    assert [by_tp[tp]["more_than_teacher"] for tp in (1, 2, 4)] == [False, False, True]
    assert by_tp[4]["bytes_per_token"] == 40.5 * 1024
    assert by_tp[4]["requests"][0]["reduction"] == pytest.approx(-0.125)
    (warning,) = report["warnings"]
    assert "at TP 4 edited holds MORE KV per GPU" in warning
    assert "40.5 KiB a token against 36 KiB" in warning
    assert "not sharded" in warning
    done = attnedit("kv", folder, "--tp", "4")
    assert done.code == 0
    assert f"warning: {warning}" in done.out.splitlines()
    assert "41,472 B +12.5%" in done.out


def test_plain_teacher_and_previews(attnedit: Attnedit, teacher: Path) -> None:
    report = report_of(attnedit, teacher)
    assert [model["name"] for model in report["models"]] == ["teacher"]
    assert report["models"][0]["per_gpu"][0]["reduction"] is None
    report = report_of(attnedit, teacher / "config.json", "--target", "gateswa", "--target", "mla")
    slopes = {m["name"]: m["per_gpu"][0]["bytes_per_token"] for m in report["models"]}
    assert slopes == {"teacher": 147_456, "gateswa": 24_576, "mla": 41_472}


def test_another_teacher(attnedit: Attnedit, teacher: Path, tmp_path: Path) -> None:
    folder = edited(tmp_path / "e", "gateswa")
    config = json.loads((teacher / "config.json").read_text()) | {"num_key_value_heads": 32}
    (teacher / "config.json").write_text(json.dumps(config))
    full = report_of(attnedit, folder, "--teacher", teacher)["models"][0]
    assert full["per_gpu"][0]["bytes_per_token"] == 4 * 147_456


def test_kv_dtype_pipeline_and_blocks(attnedit: Attnedit, tmp_path: Path) -> None:
    folder = edited(tmp_path / "e", "gateswa")
    options = ("--kv-dtype", "fp8", "--pp", "2", "--block-size", "64", "--length", "1000")
    report = report_of(attnedit, folder, *options)
    assert report["bytes_per_element"] == 1
    gpu = report["models"][1]["per_gpu"][0]
    assert gpu["bytes_per_token"] == 24_576 // 4
    assert gpu["requests"][0]["block_bytes"] == 2048 * (3 * 1024 + 15 * 3 * 64)


def test_padding_is_told(attnedit: Attnedit, tmp_path: Path) -> None:
    folder = edited(tmp_path / "e", "gateswa", full_layers=(5, 11, 17, 23, 35))
    report = report_of(attnedit, folder)
    assert report["models"][1]["padding_layers"] == 4  # 31 window layers in groups of 5
    assert "adds 4 empty layers" in report["warnings"][0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_every_family(family: str, attnedit: Attnedit, tmp_path: Path) -> None:
    config = tiny_config(family)
    config.save_pretrained(tmp_path / "t")
    AttnEditConfig(family, tiny_edit(), **config.to_dict()).save_pretrained(tmp_path / "e")
    plain = report_of(attnedit, tmp_path / "t", "--tp", "2")["models"][0]
    full, ours = report_of(attnedit, tmp_path / "e", "--tp", "2")["models"]
    assert full == plain
    assert full["per_gpu"][0]["bytes_per_token"] == 4 * 2 * 32 * 2
    assert ours["per_gpu"][0]["reduction"] == 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tp", "3"), "--tp: 3: use a divisor of num_attention_heads, 32"),
        (("--tp", "64"), "--tp: 64: use a divisor of num_attention_heads, 32"),
        (("--tp", "two"), "--tp: two: give integers >= 1"),
        (("--pp", "0"), "--pp: 0: give an integer >= 1"),
        (("--pp", "40"), "--pp: 40: use at most 36"),
        (("--memory", "-4GiB"), "--memory: -4GiB: give bytes >= 0"),
        (("--memory", "lots"), "--memory: lots: give bytes >= 0"),
        (("--length", "0"), "--length: 0: give integers >= 1"),
        (("--length", "-8"), "--length: -8: give integers >= 1"),
        (("--block-size", "0"), "--block-size: 0: give an integer >= 1"),
        (("--kv-dtype", "int4"), "--kv-dtype: int4: use one of auto, bf16"),
        (("--target", "gqa"), "--target: gqa: use gateswa or mla"),
        (("--teacher", "x"), "--teacher: x: leave it out"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], message: str, attnedit: Attnedit, teacher: Path
) -> None:
    assert message in attnedit.refused("kv", teacher, *options)


def test_bad_checkpoints(
    attnedit: Attnedit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "give a folder that holds a config.json" in attnedit.refused("kv", empty)
    assert "give an existing folder or config.json" in attnedit.refused("kv", tmp_path / "none")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    message = attnedit.refused("kv", "nobody/no-such-model")
    assert "nobody/no-such-model: give an existing folder, or a hub id that can be" in message

    assert "runs/my--model: give an existing folder" in attnedit.refused("kv", "runs/my--model")
    assert "give a shorter name" in attnedit.refused("kv", "x" * 300)

    folder = edited(tmp_path / "e", "gateswa")
    assert "leave it out" in attnedit.refused("kv", folder, "--target", "mla")
    assert "--teacher" in attnedit.refused("kv", folder, "--teacher", empty)


def test_a_per_head_norm_has_no_fp8_cache(attnedit: Attnedit, tmp_path: Path) -> None:
    folder = tiny_edited_checkpoint(
        tiny_edited("qwen3", tiny_edit("mla", qk_norm="per_head")), tmp_path / "norm"
    )
    line = attnedit.refused("kv", folder, "--kv-dtype", "fp8")
    assert line.startswith("attnedit: --kv-dtype: fp8: use auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention_edit": {"version": 2, "layer_types": []}},
            "attention_edit.version: 2: upgrade",
        ),
        ({"num_hidden_layers": 35}, "attention_edit.layer_types: 36 entries: give 35"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0: give an integer >= 1"),
        ({"num_attention_heads": "32"}, "num_attention_heads: 32: give an integer >= 1"),
        ({"intermediate_size": "many"}, "config.json: Validation error for field"),
        ({"base_model_type": "gpt2"}, "base_model_type: gpt2: use a teacher of a supported family"),
        ({"model_type": "gpt2"}, "model_type: gpt2: use a teacher of a supported family"),
    ],
)
def test_bad_configs(
    change: dict[str, Any], message: str, attnedit: Attnedit, tmp_path: Path
) -> None:
    path = edited(tmp_path / "e", "gateswa") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in attnedit.refused("kv", path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_no_json_object(content: bytes, attnedit: Attnedit, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert "give a file with one JSON object" in attnedit.refused("kv", tmp_path)


def test_missing_base_model_type(attnedit: Attnedit, tmp_path: Path) -> None:
    path = edited(tmp_path / "e", "gateswa") / "config.json"
    config = json.loads(path.read_text())
    del config["base_model_type"]
    path.write_text(json.dumps(config))
    assert "base_model_type: None: name the teacher's model_type" in attnedit.refused("kv", path)


def test_quantities() -> None:
    assert parse_bytes("f", "40GiB") == 40 * 2**30
    assert parse_bytes("f", "1.5 mib") == 3 * 2**19
    assert parse_bytes("f", "24GB") == 24 * 10**9
    assert parse_bytes("f", "0") == 0
    assert parse_bytes("f", "123b") == 123
    for bad in ("", "GiB", "4 parsecs", "1e9", "nan", "-1", "1.5.5KB"):
        with pytest.raises(AttnEditError):
            parse_bytes("f", bad)
    assert parse_counts("f", ["8K", "1,2, 4", "2"]) == [8192, 1, 2, 4]
    for bad in ("", "1,", "0", "1.5", "K", "8M"):
        with pytest.raises(AttnEditError):
            parse_counts("f", [bad])
    assert [format_bytes(n) for n in (0, 1023, 1024, 41_472, 2**40, 2**51)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "40.5 KiB",
        "1.00 TiB",
        "2,048.0 TiB",
    ]


def test_a_stages_windows_are_those_of_the_fullest_stage(
    attnedit: Attnedit, tmp_path: Path
) -> None:
    """Five stages of 36 layers: (full, window) are (1, 6), (1, 6), (1, 6), (1, 7) and (2, 5)."""
    folder = edited(tmp_path / "e", "gateswa")
    whole, stage = (
        report_of(attnedit, folder, "--pp", pp)["models"][1]["per_gpu"][0] for pp in ("1", "5")
    )
    assert stage["bytes_per_token"] * 6 == whole["bytes_per_token"] * 2
    assert stage["window_bytes"] * 30 == whole["window_bytes"] * 5
