"""``verify_checkpoint`` with the real vLLM in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.unit.tiny import tiny_edit, tiny_teacher
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.verification.run import verify_checkpoint

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(("family", "target"), [("qwen3", "gateswa"), ("qwen2", "mla")])
def test_an_edited_checkpoint_verifies(family: str, target: str, tmp_path: Path) -> None:
    checkpoint = tiny_edited_checkpoint(tiny_edited(family, tiny_edit(target)), tmp_path)
    report = verify_checkpoint(str(checkpoint), tokens=24)
    assert report["ok"], report
    assert len(report["prompts"]) == 3
    assert all(0 < prompt["decode_error"] < 1e-3 for prompt in report["prompts"])


def test_a_plain_teacher_verifies(tmp_path: Path) -> None:
    report = verify_checkpoint(str(tiny_teacher("llama", tmp_path)), tokens=24)
    assert report["ok"], report


def test_a_wrong_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM gets a checkpoint whose gates differ from those that the reference read."""
    checkpoint = tiny_edited_checkpoint(tiny_edited("qwen3"), tmp_path)
    from vllm_attnedit.verification import reference

    generate = reference.generate_reference

    def generate_then_damage(*args, **kwargs):
        references = generate(*args, **kwargs)
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["model.layers.2.self_attn.g_proj.weight"] *= 1.05
        save_file(tensors, checkpoint / "model.safetensors")
        return references

    monkeypatch.setattr(reference, "generate_reference", generate_then_damage)
    report = verify_checkpoint(str(checkpoint), tokens=24)
    assert not report["ok"]
    assert any("log-probabilities differ" in f for p in report["prompts"] for f in p["failures"])
