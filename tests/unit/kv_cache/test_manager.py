"""The window manager, driven at random against a plain model of memory."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

from tests.unit.kv_cache.model_engine import ModelEngine
from vllm_attnedit.kv_cache.manager import GateSWAManager
from vllm_attnedit.kv_cache.spec import blocks_per_request

EXAMPLES, STEPS = 800, 50


class ManagerMachine(RuleBasedStateMachine):
    """Any order of arrivals, chunks, decodes, drafts, hits, preemptions and ends."""

    steps = 0  # of all runs: the scheduler steps that were checked

    @initialize(
        window=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 17]),
        drafts=st.sampled_from([0, 0, 2]),
        pack=st.sampled_from([1, 1, 3]),
        caching=st.booleans(),
        num_blocks=st.sampled_from([60, 120, 250]),
        seed=st.integers(0, 2**16),
        order=st.permutations([0, 1, 2]),
        stored_blocks=st.sampled_from([None, None, 1, 4]),
    )
    def start(
        self,
        window: int,
        drafts: int,
        pack: int,
        caching: bool,
        num_blocks: int,
        seed: int,
        order: list[int],
        stored_blocks: int | None,
    ) -> None:
        self.rng = random.Random(seed)
        self.engine = ModelEngine(
            window=window,
            drafts=drafts,
            pack=pack,
            caching=caching,
            num_blocks=num_blocks,
            max_model_len=160,
            layer_order=tuple(order),
            stored_tail=None if stored_blocks is None else window - 1 + 4 * stored_blocks,
        )
        # Prompts start with a piece of one of three texts, so that prefixes are shared.
        self.texts = [[self.rng.randrange(50) for _ in range(100)] for _ in range(3)]

    def pick(self) -> str | None:
        names = sorted(self.engine.running)
        return self.rng.choice(names) if names else None

    @rule(text=st.integers(0, 2), shared=st.integers(0, 80), own=st.integers(1, 40))
    def arrive(self, text: int, shared: int, own: int) -> None:
        if len(self.engine.running) < 6:
            tail = [self.rng.randrange(50) for _ in range(own)]
            self.engine.add(self.texts[text][:shared] + tail)

    @rule(chunk=st.integers(1, 60), share=st.floats(0.2, 1.0))
    def step(self, chunk: int, share: float) -> None:
        names = sorted(self.engine.running)
        chosen = [name for name in names if self.rng.random() <= share]
        self.rng.shuffle(chosen)
        done = self.engine.step({name: self.rng.randint(1, chunk) for name in chosen}, self.rng)
        ManagerMachine.steps += 1
        starved = [name for name in chosen if name not in done]
        if starved and len(names) > 1:  # what a scheduler does: somebody gives way
            self.engine.preempt(self.rng.choice(names))
        for name in names:
            request = self.engine.running[name].request
            if request.num_tokens > 140:
                self.engine.finish(name)

    @rule()
    def decode_all(self) -> None:
        ready = {
            name: 1
            for name, run in self.engine.running.items()
            if run.request.num_tokens - run.request.num_computed_tokens == 1 and not run.first_step
        }
        self.engine.step(ready, self.rng)
        ManagerMachine.steps += 1

    @rule()
    def preempt(self) -> None:
        if (name := self.pick()) is not None:
            self.engine.preempt(name)

    @rule()
    def abort(self) -> None:
        if (name := self.pick()) is not None:
            self.engine.finish(name)

    @invariant()
    def pool_is_consistent(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_pool()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for name in list(self.engine.running):
            self.engine.finish(name)
        self.engine.check_pool()
        assert self.engine.pool.get_num_free_blocks() == self.engine.baseline


def run_machine(examples: int = EXAMPLES, shrink: bool = True) -> None:
    phases = set(Phase) if shrink else {Phase.generate}
    run_state_machine_as_test(
        ManagerMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
            report_multiple_bugs=False,
            phases=phases,
            derandomize=not shrink,  # a mutant is caught every time or never
            database=None,
        ),
    )


@pytest.mark.timeout(600)
def test_ten_thousand_random_steps():
    ManagerMachine.steps = 0
    run_machine()
    assert ManagerMachine.steps >= 10_000


def stops_at_first_null(self: GateSWAManager, request_id: str, end: int) -> None:
    """The leak: null blocks are taken for the end of what is still to be returned."""
    blocks = self.req_to_blocks[request_id]
    for i in range(min(end, len(blocks)) - 1, -1, -1):
        if blocks[i].is_null:
            break
        self.block_pool.free_blocks([blocks[i]])
        blocks[i] = self._null_block


def releases_one_block_early(self: GateSWAManager, request_id: str, end: int) -> None:
    original_release(self, request_id, end + 1)


original_release = GateSWAManager._release


@pytest.mark.parametrize("mutant", [stops_at_first_null, releases_one_block_early])
def test_the_machine_catches_mutants(mutant, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(GateSWAManager, "_release", mutant)
    with pytest.raises(AssertionError):
        run_machine(300, shrink=False)


def reuses_the_block_the_chunk_starts_in(self, request_id, num_tokens):
    """Its rest is written in this step, under its old index."""
    found = original_reusable(self, request_id, num_tokens)
    blocks = self.req_to_blocks[request_id]
    i = self.computed_tokens[request_id] // self.block_size
    needed = self._first_needed_block(num_tokens)
    return found + [i] if found and i < min(needed, len(blocks)) else found


def frees_at_once(self, request_id, num_tokens):
    """What leaves the window goes to anybody in the same step, other groups included."""
    if request_id in self.known_to_worker:
        computed = self.computed_tokens[request_id]
        end = min(self._first_needed_block(num_tokens), computed // self.block_size)
        self._release(request_id, end)
    return []


original_reusable = GateSWAManager._reusable


@pytest.mark.parametrize("mutant", [reuses_the_block_the_chunk_starts_in, frees_at_once])
def test_the_machine_catches_wrong_reuse(mutant, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(GateSWAManager, "_reusable", mutant)
    with pytest.raises((AssertionError, ValueError)):
        run_machine(300, shrink=False)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 128])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 500])
def test_peak_is_independent_of_the_chunk(window: int, chunk: int):
    engine = ModelEngine(
        window=window, block_size=16, num_blocks=600, max_model_len=4000, caching=False
    )
    rng = random.Random(0)
    name = engine.add([rng.randrange(50) for _ in range(1100)])
    while engine.running[name].request.num_computed_tokens < 1150:
        engine.step({name: chunk}, rng)
    assert engine.peak_held <= -(-(window - 1) // 16) + 2
    assert engine.peak_held <= blocks_per_request(window, 16, 0)
    engine.finish(name)
    assert engine.pool.get_num_free_blocks() == engine.baseline


def test_stock_holds_the_whole_chunk():
    """The control of the test above: what vLLM's own manager does with the same traffic."""
    engine = ModelEngine(
        window=16, block_size=16, num_blocks=600, max_model_len=4000, caching=False, stock=True
    )
    name = engine.add(list(range(40)) * 20)
    engine.step({name: 500}, random.Random(0))
    manager = engine.manager.coordinator.single_type_managers[1]
    assert type(manager) is SlidingWindowManager
    assert sum(not b.is_null for b in manager.req_to_blocks[name]) == 32


def test_a_block_that_some_layer_fills_in_part_serves_no_hit():
    """All layers store the last 8 of the chunk's 17 tokens, one of the four in block 2 less: drafts
    that may be rejected keep the block, and a prompt that ends behind it must not resume there."""
    engine = ModelEngine(window=5, drafts=2, num_blocks=60, max_model_len=160, stored_tail=8)
    rng = random.Random(0)
    text = [rng.randrange(50) for _ in range(30)]
    first = engine.add(text[:21])
    engine.step({first: 17}, rng)
    second = engine.add(text[:12] + [rng.randrange(50) for _ in range(13)])
    engine.step({first: 1, second: 1}, rng)  # reads are checked
    assert engine.hit_tokens == 0
