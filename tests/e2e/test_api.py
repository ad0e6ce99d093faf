"""A served edit of the real model, through the OpenAI client."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI
from transformers import AutoTokenizer

from tests.e2e.conftest import MODEL, attnedit
from vllm_attnedit.checkpoint import load_config
from vllm_attnedit.kv_live import build_live_report
from vllm_attnedit.kv_server import connect, read_model_root, read_state

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

# Several windows long: most layers have lost its beginning by its end.
LONG = "The quick brown fox jumps over the lazy dog near the river bank. " * 30


@pytest.fixture(scope="module")
def tokenizer(gateswa: Path):
    return AutoTokenizer.from_pretrained(gateswa)


def test_models(client: OpenAI):
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert model.model_dump()["max_model_len"] == 2048


def test_chat_answers_like_the_teacher(client: OpenAI):
    """The whole exchange fits in the window, where the edit is the teacher."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=24,
    )
    assert "Paris" in (answer.choices[0].message.content or "")


@pytest.mark.parametrize("prompt", ["The capital of France is", LONG])
def test_token_counts(client: OpenAI, tokenizer, prompt: str):
    completion = client.completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=7, extra_body={"ignore_eos": True}
    )
    usage = completion.usage
    assert usage is not None
    assert usage.prompt_tokens == len(tokenizer(prompt)["input_ids"])
    assert usage.completion_tokens == 7
    assert completion.choices[0].finish_reason == "length"


def test_logprobs(client: OpenAI):
    completion = client.completions.create(
        model=MODEL, prompt="One, two, three,", temperature=0, max_tokens=5, logprobs=3
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == completion.choices[0].text
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert value == pytest.approx(max(top.values()))  # greedy takes the best
        assert top[token] == pytest.approx(value)


def test_stop(client: OpenAI):
    completion = client.completions.create(
        model=MODEL, prompt="One, two, three,", temperature=0, max_tokens=40, stop=["six"]
    )
    assert completion.choices[0].finish_reason == "stop"
    assert "six" not in completion.choices[0].text
    assert "five" in completion.choices[0].text


def test_streaming_equals_the_whole(client: OpenAI):
    whole = client.completions.create(model=MODEL, prompt=LONG, temperature=0, max_tokens=30)
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=LONG,
            temperature=0,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_sixteen_streams_at_once(client: OpenAI):
    async def stream(session: AsyncOpenAI, i: int) -> str:
        text = ""
        events = await session.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"{LONG[: 200 * i]} Count to {i + 3}."}],
            temperature=0,
            max_tokens=40,
            stream=True,
        )
        async for event in events:
            text += event.choices[0].delta.content or ""
        return text

    async def all_streams() -> list[str]:
        async with AsyncOpenAI(
            base_url=str(client.base_url), api_key="none", timeout=600.0, max_retries=0
        ) as session:
            return await asyncio.gather(*(stream(session, i) for i in range(16)))

    texts = asyncio.run(all_streams())
    assert len(texts) == 16
    assert all(texts)


def test_bad_requests_are_refused(client: OpenAI):
    with pytest.raises(BadRequestError):
        client.completions.create(model=MODEL, prompt="x " * 5000, max_tokens=1)


def test_kv_memory_is_read_live(client: OpenAI):
    """What the engine measured, while four long answers are written; nothing once they are cut."""
    streams = [
        client.completions.create(
            model=MODEL,
            prompt=f"{i} {LONG}",
            max_tokens=1500,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for i in range(4)
    ]
    for stream in streams:
        next(iter(stream))
    time.sleep(1.5)  # the gauge is set about once a second
    with connect(str(client.base_url)) as server:
        report = build_live_report(load_config(read_model_root(server)), read_state(server))
    shown = attnedit("kv", "--server", client.base_url)
    for stream in streams:
        stream.close()
    assert shown.returncode == 0, shown.stderr
    assert "measured by the engine" in shown.stdout
    full, windows = report["groups"]
    assert (report["split"], report["running"]) == ("measured", 4)
    assert (full["groups"], windows["groups"]) == (1, 5)
    assert full["blocks"][0] + windows["blocks"][0] == report["blocks_in_use"]
    # A window of one block spans two at most while decoding, of each request in each group.
    assert 4 * 5 <= windows["blocks"][0] <= windows["formula_blocks"] == 4 * 5 * 2
    assert report["reduction"][0] == pytest.approx(report["formula_reduction"], abs=0.1)
