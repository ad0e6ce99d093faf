"""Prefix caching with a fraction of the blocks: hits and hashed blocks against vLLM's own manager,
on the two kinds of traffic that share prefixes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.unit.kv_cache.model_engine import ModelEngine

WINDOW, BLOCK, CHUNK = 128, 16, 1024


@dataclass
class Outcome:
    prompt_tokens: int
    hit_tokens: int
    hashed_blocks: int


def serve(engine: ModelEngine, prompt: list[int], answer: int, rng: random.Random) -> list[int]:
    """One request from arrival to end; returns its tokens."""
    name = engine.add(prompt)
    request = engine.running[name].request
    while request.num_tokens < len(prompt) + answer:
        engine.step({name: CHUNK}, rng)
    tokens = list(request.all_token_ids)
    # Asynchronous scheduling: the next step starts before this one's end is known.
    engine.manager.new_step_starts()
    engine.finish(name)
    return tokens


def text(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(50_000) for _ in range(tokens)]


def conversations(engine: ModelEngine, rng: random.Random) -> int:
    """Each turn's prompt is the whole conversation so far; the turns of several interleave."""
    histories = [text(rng, rng.randint(300, 900)) for _ in range(6)]
    asked = 0
    for _ in range(6):
        for i, history in enumerate(histories):
            asked += len(history)
            answered = serve(engine, history, rng.randint(80, 300), rng)
            histories[i] = answered + text(rng, rng.randint(20, 300))
    return asked


def shared_prefixes(engine: ModelEngine, rng: random.Random) -> int:
    """Many questions about a few documents."""
    documents = [text(rng, rng.randint(1500, 4000)) for _ in range(3)]
    asked = 0
    for _ in range(60):
        prompt = rng.choice(documents) + text(rng, rng.randint(500, 1500))
        asked += len(prompt)
        serve(engine, prompt, rng.randint(100, 400), rng)
    return asked


def measure(
    traffic: Callable[[ModelEngine, random.Random], int], stock: bool, pack: int
) -> Outcome:
    engine = ModelEngine(
        window=WINDOW,
        block_size=BLOCK,
        pack=pack,
        num_blocks=40_000,
        max_model_len=8192,
        stock=stock,
        check_memory=False,
    )
    asked = traffic(engine, random.Random(1))
    assert engine.pool.get_num_free_blocks() == engine.baseline
    return Outcome(asked, engine.hit_tokens, engine.hashed_window_blocks())


@pytest.mark.parametrize(
    ("traffic", "least_hits"),
    [
        # Every turn resumes where vLLM's own manager resumes.
        (conversations, 1.0),
        # The second request of each document finds the branching point: until then a document is
        # resumed at the last chunk's end.
        (shared_prefixes, 0.98),
    ],
)
@pytest.mark.parametrize("pack", [1, 5])
def test_hits_of_stock_with_a_quarter_of_its_blocks(
    traffic: Callable[[ModelEngine, random.Random], int], least_hits: float, pack: int
):
    stock, ours = (measure(traffic, stock=stock, pack=pack) for stock in (True, False))
    print(f"{traffic.__name__}, {pack}: stock {stock}, ours {ours}")
    assert stock.hit_tokens > 0.5 * stock.prompt_tokens  # the traffic does share
    assert ours.hit_tokens >= least_hits * stock.hit_tokens
    assert ours.hashed_blocks <= stock.hashed_blocks / 4


@pytest.mark.parametrize("pack", [1, 5])
# The last boundary's tail lies in the only chunk; in the second of two; in both.
@pytest.mark.parametrize("length", [1000, CHUNK + 900, CHUNK + 30, CHUNK + 100, CHUNK + 170])
def test_a_replay_of_the_prompt_hits_its_tail(length: int, pack: int):
    engine = ModelEngine(window=WINDOW, block_size=BLOCK, pack=pack, num_blocks=2000,
                         max_model_len=8192, check_memory=False)  # fmt: skip
    rng = random.Random(0)
    prompt = text(rng, length)
    serve(engine, prompt, 400, rng)
    assert engine.hit_tokens == 0
    serve(engine, prompt, 400, rng)
    assert engine.hit_tokens == (length - 1) // (BLOCK * pack) * (BLOCK * pack)
