"""The comparison of served and reference models: its judgement, its prompts, its reference side."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.command import Attnedit, attnedit
from tests.unit.tiny import tiny_edit, tiny_teacher, tiny_tokenizer
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.verification import (
    Answer,
    EngineSettings,
    Reference,
    ServingError,
    compare,
    default_lengths,
    default_prompts,
    served,
)
from vllm_attnedit.verification.prompts import read_prompts
from vllm_attnedit.verification.reference import generate_reference

__all__ = ["attnedit"]

REFERENCE = Reference(
    prompt=[1, 2, 3],
    tokens=[10, 11, 12],
    logprobs=[-0.5, -0.7, -0.9],
    top=[{10: -0.5, 20: -2.0}, {11: -0.7, 21: -0.7004}, {12: -0.9, 22: -0.95}],
)
AGREEING = Answer(
    tokens=[10, 11, 12],
    logprobs=[-0.5, -0.7, -0.9],
    read_logprobs=[-0.5, -0.7, -0.9],
    read_greedy=[10, 11, 12],
)


def test_agreement() -> None:
    verdict = compare(REFERENCE, AGREEING, 1e-3)
    assert verdict.ok
    assert (verdict.prompt_tokens, verdict.steps, verdict.equal_steps) == (3, 3, 3)
    assert verdict.decode_error == verdict.read_error == 0
    assert not verdict.tie


def test_a_near_tie_is_a_tie_and_no_failure() -> None:
    parted = replace(
        AGREEING, tokens=[10, 21, 99], logprobs=[-0.5, -0.7, -3.0], read_greedy=[10, 21, 12]
    )
    verdict = compare(REFERENCE, parted, 1e-3)
    assert verdict.ok
    assert verdict.tie
    assert verdict.equal_steps == 1
    # Another tolerance, and it is a failure.
    strict = compare(REFERENCE, parted, 1e-4)
    assert not strict.ok
    assert not strict.tie
    assert strict.failures == (
        "greedy token 1 is 21 instead of 11",
        "most likely token 1 is 21 instead of 11 while reading",
    )


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"tokens": [10, 11, 22]}, "greedy token 2 is 22 instead of 12"),
        ({"tokens": [10, 77, 12]}, "greedy token 1 is 77 instead of 11"),  # not even a candidate
        ({"logprobs": [-0.5, -0.702, -0.9]}, "log-probabilities differ by 0.002 while decoding"),
        ({"read_logprobs": [-0.5, -0.7, -0.91]}, "log-probabilities differ by 0.01 while reading"),
        ({"read_greedy": [10, 11, 22]}, "most likely token 2 is 22 instead of 12 while reading"),
        ({"logprobs": [-0.5, math.nan, -0.9]}, "log-probabilities differ by inf while decoding"),
        ({"read_logprobs": [math.nan] * 3}, "log-probabilities differ by inf while reading"),
        ({"logprobs": [-0.5, -math.inf, -0.9]}, "log-probabilities differ by inf while decoding"),
    ],
)
def test_each_disagreement_is_named(changes: dict[str, Any], failure: str) -> None:
    verdict = compare(REFERENCE, replace(AGREEING, **changes), 1e-3)
    assert verdict.failures == (failure,)
    assert not verdict.ok


def test_after_a_tie_reading_still_judges_every_step() -> None:
    parted = replace(
        AGREEING,
        tokens=[10, 21, 99],
        logprobs=[-0.5, -0.7, -3.0],
        read_logprobs=[-0.5, -0.7, -0.95],
    )
    verdict = compare(REFERENCE, parted, 1e-3)
    assert verdict.tie
    assert verdict.failures == ("log-probabilities differ by 0.05 while reading",)


def test_answers_of_another_length_are_no_answers() -> None:
    with pytest.raises(ValueError, match="read_greedy: 2 steps instead of 3"):
        compare(REFERENCE, replace(AGREEING, read_greedy=[10, 11]), 1e-3)


@given(
    steps=st.integers(1, 8), data=st.data(), tolerance=st.floats(1e-4, 0.5), error=st.floats(0, 1)
)
def test_the_tolerance_decides(
    steps: int, data: st.DataObject, tolerance: float, error: float
) -> None:
    logprobs = data.draw(st.lists(st.floats(-20, 0), min_size=steps, max_size=steps))
    at = data.draw(st.integers(0, steps - 1))
    tokens = list(range(steps))
    top = [{t: lp} for t, lp in zip(tokens, logprobs, strict=True)]
    moved = [lp - error if i == at else lp for i, lp in enumerate(logprobs)]
    reference = Reference([0], tokens, logprobs, top)
    verdict = compare(reference, Answer(tokens, moved, logprobs, tokens), tolerance)
    assert verdict.ok == (abs(logprobs[at] - moved[at]) <= tolerance)
    assert verdict.decode_error == pytest.approx(error, abs=1e-12)


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


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the script that runs vLLM."""
    script = tmp_path / "worker.py"
    monkeypatch.setattr(served, "_WORKER", script)
    return script


ECHO = """
import json, os, sys
request = json.load(open(sys.argv[1]))
request["environ"] = {k: v for k, v in os.environ.items() if "VLLM" in k or k == "EXTRA"}
json.dump(request, open(os.environ["SEEN"], "w"))
answers = [{"tokens": j["tokens"], "logprobs": [0.0] * 3, "read_logprobs": [float("nan")] * 3,
            "read_greedy": j["tokens"]} for j in request["jobs"]]
json.dump(answers, open(sys.argv[2], "w"))
"""


def test_engine_settings_reach_the_worker(worker: Path, tmp_path: Path) -> None:
    worker.write_text(ECHO)
    seen = tmp_path / "seen.json"
    settings = EngineSettings(
        dtype="bfloat16",
        max_num_batched_tokens=4,
        kv_memory=3 * 2**30 - 1,
        engine_args={"block_size": 32, "enforce_eager": False},
        environ={"SEEN": str(seen), "EXTRA": "1"},
    )
    (answer,) = served.serve_offline("folder", [REFERENCE], settings)
    assert answer.tokens == [10, 11, 12]
    assert math.isnan(answer.read_logprobs[0])
    request = json.loads(seen.read_text())
    assert request["jobs"] == [{"prompt": [1, 2, 3], "tokens": [10, 11, 12]}]
    expected = {"model": "folder", "dtype": "bfloat16", "max_model_len": 7, "block_size": 32}
    expected |= {"enforce_eager": False, "max_num_batched_tokens": 4, "max_num_seqs": 4}
    assert expected.items() <= request["engine"].items()
    assert request["environ"]["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert request["environ"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert request["environ"]["EXTRA"] == "1"


def test_a_failing_engine_shows_its_last_lines(worker: Path) -> None:
    worker.write_text("for i in range(40): print('line', i)\nraise SystemExit('out of memory')")
    with pytest.raises(ServingError) as caught:
        served.serve_offline("folder", [REFERENCE], EngineSettings())
    lines = str(caught.value).splitlines()
    assert lines[0] == "vLLM failed; its last lines:"
    assert "out of memory" in lines
    assert "line 39" in lines
    assert "line 3" not in lines


def test_a_hanging_engine_is_ended_with_its_children(worker: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    worker.write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(ServingError, match="did not end within 2 seconds"):
        served.serve_offline("folder", [REFERENCE], EngineSettings(timeout=2))
    for pid in map(int, pids.read_text().split()):
        assert _ends(pid)


def _ends(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (ProcessLookupError, FileNotFoundError):
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":  # dead, waiting for init
            return True
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return False


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


def test_importing_the_package_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, vllm_attnedit.verification; print(*{'torch', 'vllm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
