"""``attnedit verify``: its report, its exit status and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.command import Attnedit, attnedit
from tests.unit.quantised import quantised_checkpoint
from tests.unit.tiny import tiny_teacher, tiny_tokenizer
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from tests.unit.verification.answers import AGREEING, REFERENCE
from vllm_attnedit.verification import Answer, EngineSettings, Reference

__all__ = ["attnedit"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_edited_checkpoint(tiny_edited("qwen3"), tmp_path / "edited")


@pytest.fixture
def vllm_agrees(monkeypatch: pytest.MonkeyPatch) -> list[EngineSettings]:
    """vLLM's side, played by the reference's own answers."""
    calls: list[EngineSettings] = []

    def serve(
        checkpoint: str, references: list[Reference], settings: EngineSettings
    ) -> list[Answer]:
        calls.append(settings)
        return [Answer(r.tokens, r.logprobs, r.logprobs, r.tokens) for r in references]

    monkeypatch.setattr("vllm_attnedit.verification.run.serve_offline", serve)
    return calls


def test_command(attnedit: Attnedit, checkpoint: Path, vllm_agrees: list[EngineSettings]) -> None:
    done = attnedit("verify", checkpoint, "--tokens", "4", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["ok"] is True
    assert report["sliding_window"] == 8
    assert [p["prompt_tokens"] for p in report["prompts"]] == [4, 8, 35]
    assert {p["steps"] for p in report["prompts"]} == {4}
    # The longest prompt is read in three chunks or more.
    assert vllm_agrees[0].max_num_batched_tokens == report["max_num_batched_tokens"] == 16
    assert report["logprob_tolerance"] == 1e-3
    report = json.loads(
        attnedit("verify", checkpoint, "--tokens", "4", "--dtype", "bfloat16", "--json").out
    )
    assert vllm_agrees[1].dtype == "bfloat16"
    assert report["logprob_tolerance"] == 0.25
    done = attnedit("verify", checkpoint, "--tokens", "4")
    assert done.code == 0
    for text in ("window 8", "4 < W", "8 = W", "35 > W", "4 of 4"):
        assert text in done.out


def test_command_on_a_disagreement(
    attnedit: Attnedit, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(
        checkpoint: str, references: list[Reference], settings: EngineSettings
    ) -> list[Answer]:
        first, *rest = references
        rivals = [min(top, key=lambda token: top[token]) for top in first.top]
        wrong = Answer(rivals, first.logprobs, first.logprobs, first.tokens)
        return [wrong, *(Answer(r.tokens, r.logprobs, r.logprobs, r.tokens) for r in rest)]

    monkeypatch.setattr("vllm_attnedit.verification.run.serve_offline", serve)
    done = attnedit("verify", checkpoint, "--tokens", "4", "--logprob-tolerance", "1e-6")
    assert done.code == 1
    assert "prompt of 4 tokens: greedy token 0 is" in done.out
    assert "differs" in done.out
    report = json.loads(attnedit("verify", checkpoint, "--tokens", "4", "--json").out)
    assert report["ok"] is False
    assert [p["ok"] for p in report["prompts"]] == [False, True, True]


def test_command_tells_of_ties(
    attnedit: Attnedit, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def references(*_: object, **__: object) -> list[Reference]:
        return [REFERENCE]

    def serve(*_: object) -> list[Answer]:
        return [replace(AGREEING, tokens=[10, 21, 99], logprobs=[-0.5, -0.7, -3.0])]

    monkeypatch.setattr("vllm_attnedit.verification.reference.generate_reference", references)
    monkeypatch.setattr("vllm_attnedit.verification.run.serve_offline", serve)
    done = attnedit("verify", checkpoint, "--tokens", "3")
    assert done.code == 0
    assert "1 of 3, then a tie" in done.out
    assert "greedy tokens part at 1, a near-tie" in done.out


def test_command_when_vllm_fails(attnedit: Attnedit, checkpoint: Path, worker: Path) -> None:
    worker.write_text("raise SystemExit('no kernel image')")
    done = attnedit("verify", checkpoint, "--tokens", "2")
    assert done.code == 1
    assert "vLLM failed" in done.err
    assert "no kernel image" in done.err


def test_command_with_a_prompt_file(
    attnedit: Attnedit, tmp_path: Path, vllm_agrees: list[EngineSettings]
) -> None:
    teacher = tiny_teacher("llama", tmp_path / "teacher")  # a plain teacher verifies as well
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo and three\n")
    done = attnedit("verify", teacher, "--prompts", prompts, "--tokens", "2", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["sliding_window"] is None
    encode = tiny_tokenizer().encode
    lengths = [len(encode(text)) for text in ("one", "two and three")]
    assert [p["prompt_tokens"] for p in report["prompts"]] == lengths


def test_bad_arguments(attnedit: Attnedit, checkpoint: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--tokens", "0"), "--tokens: 0: give an integer >= 1"),
        (("--tokens", "2047"), "--tokens"),
        (("--dtype", "int8"), "--dtype: int8: use one of float32, bfloat16"),
        (("--logprob-tolerance", "0"), "--logprob-tolerance: 0.0: give a number between 0 and 1"),
        (("--logprob-tolerance", "nan"), "--logprob-tolerance: nan: give a number"),
        (("--prompts", tmp_path / "none"), "--prompts"),
    ):
        assert message in attnedit.refused("verify", checkpoint, *arguments)
    assert "give the folder" in attnedit.refused("verify", checkpoint / "config.json")
    assert "existing folder" in attnedit.refused("verify", tmp_path / "none")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    (tmp_path / "p.txt").write_text("one")
    message = attnedit.refused("verify", checkpoint, "--prompts", tmp_path / "p.txt")
    assert "the checkpoint has no tokenizer" in message


def test_what_the_reference_cannot_read_is_one_line(
    attnedit: Attnedit, checkpoint: Path, tmp_path: Path
) -> None:
    quantised = quantised_checkpoint(tiny_edited("qwen3"), "gptq", tmp_path / "quantised")
    assert "give the unquantised checkpoint" in attnedit.refused("verify", quantised)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors" in attnedit.refused("verify", checkpoint)
