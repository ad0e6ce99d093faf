"""Teacher-written text up to the sampler, which integration tests run for real."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.unit.training.small import small_config
from training import generate
from training.generate import beginnings, write_texts, written
from training.models import load_tokenizer
from vllm_attnedit.errors import AttnEditError


@pytest.fixture
def config(tmp_path, pair, text):
    return small_config(
        tmp_path, *pair, text, generate={"samples": 7, "seed_tokens": 3, "batch": 2}
    )


def test_drawn_beginnings_are_plain_different_and_repeatable(config):
    tokenizer = load_tokenizer(config.teacher)
    found = beginnings(config, tokenizer)
    assert [len(ids) for ids in found] == [3] * 7
    assert len({tuple(ids) for ids in found}) == 7
    assert not set(tokenizer.all_special_ids) & {i for ids in found for i in ids}
    assert beginnings(config, tokenizer) == found
    config.seed = 1
    assert beginnings(config, tokenizer) != found


def test_beginnings_from_a_file(config, tmp_path):
    tokenizer = load_tokenizer(config.teacher)
    (tmp_path / "seeds.txt").write_text("the rain\n\nover land\n")
    config.generate.seeds = str(tmp_path / "seeds.txt")
    texts = [tokenizer.decode(ids) for ids in beginnings(config, tokenizer)]
    assert texts == ["the rain", "over land"] * 3 + ["the rain"]
    (tmp_path / "seeds.txt").write_text("\n")
    with pytest.raises(AttnEditError, match=r"generate\.seeds"):
        beginnings(config, tokenizer)
    config.generate.seeds = str(tmp_path / "nowhere")
    with pytest.raises(AttnEditError, match=r"generate\.seeds"):
        beginnings(config, tokenizer)


def test_what_is_written_is_not_asked_for_again(config, tmp_path, monkeypatch):
    path = tmp_path / "teacher.jsonl"
    requests = []

    def sample(request, _lock):
        requests.append(request)
        with path.open("a") as out:
            for text, seed in zip(request["texts"], request["seeds"]):
                out.write(json.dumps({"text": text, "seed": seed}) + "\n")

    monkeypatch.setattr(generate, "_run_sampler", sample)
    monkeypatch.setattr(generate, "find_spec", lambda name: object())
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "cut o')
    write_texts(config)
    assert written(path) == 7
    assert requests[0]["seeds"] == [2, 3, 4, 5, 6]
    assert requests[0]["out"] == str(path)
    write_texts(config)
    assert len(requests) == 1


def test_two_do_not_write_one_file(config, monkeypatch):
    monkeypatch.setattr(generate, "find_spec", lambda name: object())

    def sample(request, _lock):
        with pytest.raises(AttnEditError, match=r"generate\.path: .*wait for the other process"):
            write_texts(config)

    monkeypatch.setattr(generate, "_run_sampler", sample)
    write_texts(config)


def test_the_sampler_ends_with_its_caller(tmp_path):
    """SIGTERM: it and what it started are gone."""
    program = "import subprocess, sys; subprocess.run(['sleep', '98765'])"
    code = (
        "import sys; from pathlib import Path; from training.generate import _run_in_a_group\n"
        f"_run_in_a_group([sys.executable, '-c', {program!r}], Path('.'), 0)"
    )
    caller = subprocess.Popen([sys.executable, "-c", code])
    while not sleepers():
        assert caller.poll() is None
        time.sleep(0.1)
    caller.terminate()
    assert caller.wait(30) == 143
    assert not sleepers()


def sleepers():
    found = subprocess.run(["pgrep", "-f", "^sleep 98765"], capture_output=True, check=False)
    return found.stdout.split()


def test_without_vllm_it_says_so(config, monkeypatch):
    monkeypatch.setattr(generate, "find_spec", lambda name: None)
    with pytest.raises(AttnEditError, match="install vllm"):
        write_texts(config)
