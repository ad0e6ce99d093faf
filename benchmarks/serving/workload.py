"""What is asked of a server, and when: a part of the schema of a serving benchmark's YAML file.

It needs pydantic alone, as the load generator does that is built on it: its image has neither torch
nor transformers, and each of its processes starts at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from benchmarks.strict_model import StrictModel

Positive = Annotated[int, Field(ge=1)]


class Workload(StrictModel):
    """What is asked, and when. Lengths are tokens.

    Attributes:
        kind: ``random`` prompts that share nothing; ``multi_turn`` conversations that begin with
            one shared prefix; a ``trace`` of lengths (and arrivals); recorded ``sessions`` of chat.
        load: ``burst`` sends a level's requests at once; ``closed`` keeps that many users asking;
            ``poisson`` arrivals at that many requests a second; ``trace`` takes the trace's own
            arrival times, sped up by the level.
        levels: concurrency, or the rate, by ``load``.
        requests: of one level; ``burst`` sends as many as the level, ``closed`` stops when steady.
        api: ``completions`` sends token ids, of exact length; ``chat`` (``random`` only; sessions
            always) sends as many common words, whose tokens the server counts.
        prefix_tokens: shared by all conversations of ``multi_turn``.
        turns: of a conversation.
        path: the trace's or the sessions' file.
        repeats: of a burst, each with prompts of its own; their range is its interval.
        systems: only these; by default all.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    kind: Literal["random", "multi_turn", "trace", "sessions"] = "random"
    load: Literal["burst", "closed", "poisson", "trace"] = "closed"
    levels: Annotated[tuple[float, ...], Field(min_length=1)]
    api: Literal["completions", "chat"] = "completions"
    prompt_tokens: Positive = 1024
    output_tokens: Positive = 256
    requests: Positive = 128
    prefix_tokens: Annotated[int, Field(ge=0)] = 0
    turns: Positive = 1
    path: Path | None = None
    seed: int = 0
    repeats: Positive = 1
    systems: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Workload:
        if (self.kind in ("trace", "sessions")) != (self.path is not None):
            raise ValueError(f"path: give a file for kind trace or sessions, not for {self.kind}")
        if self.load == "trace" and self.kind != "trace":
            raise ValueError("load: trace needs kind: trace, which has arrival times")
        if self.api == "chat" and self.kind != "random":
            raise ValueError("api: chat is for kind random; sessions are chat by themselves")
        if any(level <= 0 for level in self.levels):
            raise ValueError("levels: give numbers above 0")
        if self.load in ("burst", "closed") and any(level % 1 for level in self.levels):
            raise ValueError(f"levels: a {self.load} load counts requests: give whole numbers")
        return self
