"""Prompts, and the reference model's answers to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny import tiny_edit, tiny_tokenizer
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.verification import default_lengths, default_prompts
from vllm_attnedit.verification.prompts import read_prompts
from vllm_attnedit.verification.reference import generate_reference


def test_lengths_lie_around_the_window() -> None:
    assert default_lengths(128, 8000) == [64, 128, 515]
    assert default_lengths(1, 8000) == [1, 7]
    assert default_lengths(None, 8000) == [16, 64, 300]
    assert default_lengths(128, 200) == [64, 128, 200]
    with pytest.raises(AttnEditError, match="--tokens"):
        default_lengths(128, 0)


@pytest.mark.parametrize("words", [True, False])
def test_prompts_have_their_lengths(words: bool) -> None:
    tokenizer = tiny_tokenizer()
    encode = (lambda text: tokenizer.encode(text)) if words else None
    lengths = [1, 64, 128, 4000]
    prompts = default_prompts(lengths, vocab_size=512, encode=encode)
    assert [len(prompt) for prompt in prompts] == lengths
    assert all(0 <= token < 512 for prompt in prompts for token in prompt)
    assert prompts == default_prompts(lengths, vocab_size=512, encode=encode)
    assert len({prompt[0] for prompt in prompts}) > 1  # no shared prefixes
    if words:
        assert "ledgers" in tokenizer.decode(prompts[2])


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    encode = tiny_tokenizer().encode
    file.write_text("one\n\n  \ntwo and three\n")
    assert read_prompts(file, encode, 50) == [encode("one"), encode("two and three")]
    with pytest.raises(AttnEditError, match=r"prompt 2 of \d+ tokens: use at most 5 tokens"):
        read_prompts(file, encode, 5)
    file.write_text("\n")
    with pytest.raises(AttnEditError, match="write at least one prompt"):
        read_prompts(file, encode, 50)
    file.write_bytes(b"\xff\xff")
    with pytest.raises(AttnEditError, match="give a text file"):
        read_prompts(file, encode, 50)
    with pytest.raises(AttnEditError, match="give a text file"):
        read_prompts(tmp_path / "none", encode, 50)


def greedy_without_cache(
    model: Any, prompt: list[int], steps: int
) -> tuple[list[int], list[float]]:
    """The oracle: the whole text again for each token."""
    ids, logprobs = list(prompt), []
    with torch.inference_mode():
        for _ in range(steps):
            step = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            ids.append(int(step.argmax()))
            logprobs.append(float(step.max()))
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_reference_generation(target: str, tmp_path: Path) -> None:
    model = tiny_edited(
        "qwen3", tiny_edit(target, **({"window": 8} if target == "gateswa" else {}))
    )
    # Sampling, penalties and an early end, all of which a verification must ignore.
    model.generation_config.update(do_sample=True, temperature=0.3, repetition_penalty=3.0)
    expected = {
        n: greedy_without_cache(model, prompt, 12)
        for n in (3, 8, 37)
        for prompt in default_prompts([n], 512, None)
    }
    model.generation_config.eos_token_id = expected[3][0][0]
    checkpoint = tiny_edited_checkpoint(model, tmp_path / "e")
    for n, (tokens, logprobs) in expected.items():
        (prompt,) = default_prompts([n], 512, None)
        (reference,) = generate_reference(checkpoint, [prompt], tokens=12, device="cpu")
        assert reference.prompt == prompt
        assert reference.tokens == tokens
        assert reference.logprobs == pytest.approx(logprobs, abs=1e-4)
        for token, logprob, top in zip(tokens, reference.logprobs, reference.top, strict=True):
            assert len(top) == 5
            assert top[token] == logprob == max(top.values())


def test_reference_dtype(tmp_path: Path) -> None:
    checkpoint = tiny_edited_checkpoint(tiny_edited("llama"), tmp_path / "e")
    prompts = default_prompts([20], 512, None)
    (full,) = generate_reference(checkpoint, prompts, tokens=1, device="cpu")
    (half,) = generate_reference(checkpoint, prompts, tokens=1, dtype="bfloat16", device="cpu")
    assert full.logprobs != half.logprobs
    assert full.logprobs == pytest.approx(half.logprobs, abs=0.3)
