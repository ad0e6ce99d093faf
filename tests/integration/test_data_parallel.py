"""Copies of a model behind one server: each answers as the reference does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving.options import Server
from benchmarks.serving.server import serving
from benchmarks.serving.system import System
from tests.integration.engine import random_prompts, reference
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 24


@contextmanager
def copies(folder: Path, log: Path, count: int, **settings: Any) -> Iterator[str]:
    """``vllm serve`` with a copy of the model on each of ``count`` devices; yields its address."""
    options: dict[str, Any] = {
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "dtype": "float32",
        "enforce_eager": True,
        # Several processes, as in production: not this test process's single one.
        "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"},
    }
    server = Server(**(options | settings), devices=count)
    system = System(name="copies", edit="mla", tensor_parallel=1)
    with serving(system, server, folder, "copies", log) as running:
        yield running.base_url


def ask(url: str, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """The greedy tokens of all prompts, sent at once."""

    def one(prompt: list[int]) -> list[int]:
        body = {"model": "copies", "prompt": prompt, "max_tokens": steps, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answer = httpx.post(url + "/v1/completions", json=body, timeout=300).raise_for_status()
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


def generated(url: str) -> dict[str, float]:
    """Tokens that each engine has generated."""
    text = httpx.get(url + "/metrics").raise_for_status().text
    return {
        sample.labels["engine"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:generation_tokens_total"
    }


@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_two_copies_equal_the_reference(target: str, tmp_path: Path) -> None:
    model = tiny_edited("qwen3", tiny_edit(target, gate="headwise"))
    folder = tiny_edited_checkpoint(model, tmp_path / "model")
    prompts = random_prompts([3, 9, 40, 90, 17, 64])
    with copies(folder, tmp_path / "log", 2) as url:
        tokens = ask(url, prompts, STEPS)
        engines = generated(url)
    assert tokens == [reference(model, prompt, STEPS).tokens for prompt in prompts]
    assert set(engines) == {"0", "1"}
    assert all(engines.values())
    assert sum(engines.values()) == STEPS * len(prompts)
