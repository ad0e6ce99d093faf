"""From a workload to its requests: the same ones, token by token, for every system and every run.

Request number i of a workload depends on the seed and on i alone, so that levels, load generators
in several processes and repeated runs all ask the same. Prompts are token ids: their length is
exact whatever the tokenizer, and no system tokenizes more than another. Answers in a conversation's
history are drawn, not taken from the model: what is asked must not depend on who answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.serving.traces import (
    MOONCAKE_BLOCK,
    Session,
    TraceRequest,
    read_sessions,
    read_trace,
)
from benchmarks.serving.workload import Workload
from vllm_attnedit.errors import AttnEditError

MARGIN = 1000
"""Ids at both ends of a vocabulary that are left out: special tokens live there."""
_CHARACTERS_PER_TOKEN = 2.5
"""Fewer than any text here has: sessions that might not fit are left out."""

_TEXT = (
    "time year people way day man thing woman life child world school state family student "
    "group country problem hand part place case week company system program question work "
    "government number night point home water room mother area money story fact month lot right "
    "study book "
)
_WORDS = _TEXT.split()
"""One token each in the usual vocabularies."""


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        body: of the OpenAI API call, without the model's name.
        path: of the call.
        output_tokens: that will come, by force.
    """

    path: str
    body: dict[str, Any]
    output_tokens: int


class Plan:
    """A workload's requests by number.

    Args:
        workload: what is asked.
        vocab_size: ids are drawn below it.
        max_model_len: requests of traces and sessions that are longer are cut to it.
    """

    def __init__(self, workload: Workload, vocab_size: int, max_model_len: int) -> None:
        self.workload, self.vocab_size, self.max_model_len = workload, vocab_size, max_model_len
        self.trace: list[TraceRequest] = []
        self.sessions: list[Session] = []
        if vocab_size < 3 * MARGIN:
            raise AttnEditError("vocab_size", vocab_size, f"use a model with {3 * MARGIN} or more")
        if workload.kind == "trace":
            assert workload.path is not None
            self.trace = read_trace(workload.path)
        elif workload.kind == "sessions":
            assert workload.path is not None
            room = (max_model_len - workload.output_tokens) * _CHARACTERS_PER_TOKEN
            self.sessions = [s for s in read_sessions(workload.path) if s.characters <= room]
            if not self.sessions:
                fix = f"no session fits in {max_model_len} tokens: raise server.max_model_len"
                raise AttnEditError(f"workload {workload.name}", workload.path, fix)
        elif self._longest() > max_model_len:
            fix = f"its longest request has {self._longest()} tokens: raise server.max_model_len"
            raise AttnEditError(f"workload {workload.name}", max_model_len, fix)
        self._builders: dict[str, Callable[[int], Ask]] = {
            "random": self._random,
            "multi_turn": self._turn,
            "trace": self._from_trace,
            "sessions": self._session,
        }

    def ask(self, number: int) -> Ask:
        """Request ``number``, from 0 on."""
        return self._builders[self.workload.kind](number)

    def arrivals(self, level: float) -> np.ndarray:
        """Seconds after the start at which requests of an open load are sent, first one first."""
        count = self.workload.requests
        if self.workload.load == "trace":
            times = [request.arrival_s for request in self.trace[:count]]
            return np.array(times) / level
        gaps = np.random.default_rng([self.workload.seed, 1]).exponential(1 / level, count)
        return np.cumsum(gaps)

    def _longest(self) -> int:
        w = self.workload
        if w.kind == "random":
            return w.prompt_tokens + w.output_tokens
        return w.prefix_tokens + w.turns * (w.prompt_tokens + w.output_tokens)

    def _tokens(self, count: int, *key: int) -> list[int]:
        rng = np.random.default_rng([self.workload.seed, *key])
        ids: list[int] = rng.integers(MARGIN, self.vocab_size - MARGIN, count).tolist()
        return ids

    def _completion(self, prompt: list[int], output_tokens: int) -> Ask:
        return Ask("/v1/completions", _body(output_tokens, prompt=prompt), output_tokens)

    def _random(self, number: int) -> Ask:
        w = self.workload
        if w.api == "completions":
            return self._completion(self._tokens(w.prompt_tokens, 2, number), w.output_tokens)
        words = np.random.default_rng([w.seed, 2, number]).choice(_WORDS, w.prompt_tokens)
        messages = [{"role": "user", "content": " ".join(words)}]
        return Ask(
            "/v1/chat/completions", _body(w.output_tokens, messages=messages), w.output_tokens
        )

    def _turn(self, number: int) -> Ask:
        """Conversation ``number // turns``, turn ``number % turns``."""
        w = self.workload
        conversation, turn = divmod(number, w.turns)
        prompt = self._tokens(w.prefix_tokens, 3)
        for earlier in range(turn):
            prompt += self._tokens(w.prompt_tokens, 4, conversation, earlier)
            prompt += self._tokens(w.output_tokens, 5, conversation, earlier)
        prompt += self._tokens(w.prompt_tokens, 4, conversation, turn)
        return self._completion(prompt, w.output_tokens)

    def _from_trace(self, number: int) -> Ask:
        request = self.trace[number % len(self.trace)]
        output = min(request.output_tokens, self.max_model_len - 1)
        length = min(request.prompt_tokens, self.max_model_len - output)
        if not request.blocks:
            return self._completion(self._tokens(length, 2, number), output)
        prompt: list[int] = []
        for block in request.blocks[: -(-length // MOONCAKE_BLOCK)]:
            prompt += self._block(block)
        return self._completion(prompt[:length], output)

    @cache  # noqa: B019 - one plan a process
    def _block(self, block: int) -> list[int]:
        return self._tokens(MOONCAKE_BLOCK, 6, block)

    def _session(self, number: int) -> Ask:
        """Chat text, whose length in tokens the tokenizer decides; the server counts it."""
        session = self.sessions[number % len(self.sessions)]
        output = self.workload.output_tokens
        body = _body(output, messages=list(session.messages))
        return Ask("/v1/chat/completions", body, output)


def _body(output_tokens: int, **prompt: Any) -> dict[str, Any]:
    return {
        **prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
