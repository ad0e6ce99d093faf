"""``attnedit edit`` as a user runs it, and the command line around it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.unit.edit.models import load, logits, tokens
from vllm_attnedit.cli import COMMANDS
from vllm_attnedit.config import AttnEditConfig

ATTNEDIT = [sys.executable, "-c", "from vllm_attnedit.cli import main; main()"]


def config_of(folder) -> AttnEditConfig:
    config = load(folder).config
    assert isinstance(config, AttnEditConfig)
    return config


def test_gateswa(attnedit, teacher_of, tmp_path):
    out = tmp_path / "out"
    done = attnedit(
        "edit", teacher_of("qwen2"), out, "--target", "gateswa", "--window", 9,
        "--full-layers", "0,2", "--gate", "elementwise", "--dtype", "float32", "--seed", 4,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert "tiny-qwen2 edited" in done.out
    assert "2 sliding_attention layers, window 9" in done.out
    config = config_of(out)
    assert config.edit.layer_types == ("full_attention", "sliding_attention") * 2
    assert (config.edit.sliding_window, config.edit.gate) == (9, "elementwise")
    assert config.provenance["seed"] == 4


def test_mla_shows_the_energy_that_it_keeps(attnedit, teacher_of, tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("any text at all will do here. " * 40)
    done = attnedit(
        "edit", teacher_of("qwen3_moe"), out, "--target", "mla", "--kv-lora-rank", 48,
        "--qk-rope-head-dim", 16, "--qk-nope-head-dim", 24, "--q-lora-rank", 96,
        "--calibration", text, "--calibration-tokens", 200,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    config = config_of(out)
    edit = config.edit
    assert (edit.kv_lora_rank, edit.qk_rope_head_dim, edit.qk_nope_head_dim) == (48, 16, 24)
    assert (edit.q_lora_rank, edit.v_head_dim) == (96, 32)
    kept = config.provenance["energy_kept"]
    assert f"{kept['key']:.2%}" in done.out
    assert f"{kept['value']:.2%}" in done.out
    assert config.provenance["calibration"]["source"] == "text.txt"
    assert config.provenance["calibration"]["tokens"] == 200


@pytest.mark.parametrize(("option", "source"), [(None, "pydoc_data.topics"), ("none", None)])
def test_calibration_by_default_and_without(attnedit, teacher_of, tmp_path, option, source):
    options = ("--calibration", option) if option else ("--calibration-tokens", 128)
    done = attnedit("edit", teacher_of("llama"), tmp_path / "out", "--target", "mla", *options)
    assert done.code == 0
    provenance = config_of(tmp_path / "out").provenance
    assert provenance.get("calibration", {}).get("source") == source


def test_an_edit_is_saved_and_applied(attnedit, teacher_of, tmp_path):
    teacher, whole, edit = teacher_of("llama"), tmp_path / "whole", tmp_path / "an.edit"
    attnedit("edit", teacher, whole, "--target", "gateswa", "--window", 4)
    saved = attnedit("edit", whole, edit, "--save-edit")
    assert (saved.code, saved.err) == (0, "")
    assert "the edit alone" in saved.out
    done = attnedit("edit", teacher, tmp_path / "again", "--from-edit", edit)
    assert (done.code, done.err) == (0, "")
    ids = tokens(12)
    assert logits(load(whole), ids).equal(logits(load(tmp_path / "again"), ids))
    line = attnedit.refused("edit", whole, edit, "--save-edit")
    assert line.endswith("name a new file: this one exists")
    line = attnedit.refused("edit", teacher_of("qwen3"), tmp_path / "no", "--from-edit", edit)
    assert "apply this edit to its own teacher, tiny-llama" in line


def test_overview_and_version(attnedit):
    for arguments in ((), ("--help",)):
        done = attnedit(*arguments)
        assert done.code == 0
        assert all(name in done.out for name in COMMANDS)
    assert attnedit("--version").out.startswith("attnedit 0.")
    assert attnedit.refused("frobnicate").startswith("attnedit: No such command 'frobnicate'")
    assert attnedit.refused("edit").lower().startswith("attnedit: missing argument 'teacher'")
    shown = attnedit("edit", "--help")
    assert shown.code == 0
    assert "--kv-lora-rank" in shown.out


def test_the_overview_imports_no_command_and_no_torch():
    code = (
        "import sys; sys.argv = ['attnedit', '--help']\n"
        "from vllm_attnedit.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'vllm', 'vllm_attnedit.cli.edit'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_leave_nothing_behind(teacher_of, tmp_path, number):
    """The edit is held up before its end, so that the signal meets a half-written folder."""
    room = tmp_path / "room"
    room.mkdir()
    code = (
        "import time, vllm_attnedit.edit.convert as convert\n"
        "convert.write_index = lambda *_: time.sleep(600)\n"
        "from vllm_attnedit.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "edit", teacher_of("llama"), room / "out"]
    with subprocess.Popen([*command, "--target", "gateswa"], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(room.glob(".out.partial-*/model*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(number)
        process.wait(30)
        assert process.stderr is not None
        message = process.stderr.read().decode()
    assert process.returncode == 128 + number
    assert "Traceback" not in message
    assert list(room.iterdir()) == []


def test_an_edited_checkpoint_carries_no_code(attnedit, teacher_of, tmp_path):
    attnedit("edit", teacher_of("llama"), tmp_path / "out", "--target", "gateswa")
    names = sorted(os.listdir(tmp_path / "out"))
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt"))]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "attnedit"
    assert config["architectures"] == ["AttnEditForCausalLM"]
    assert config["attention_edit"]["version"] == 1
    assert "auto_map" not in config
