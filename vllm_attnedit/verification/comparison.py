"""When a served model and its reference agree. Plain Python: no model is touched here.

Two questions are asked. *Decoding*: vLLM generates on its own; its tokens and their
log-probabilities are compared up to the first token that differs, after which the texts have
nothing in common. *Reading*: vLLM reads prompt and reference tokens together, in chunks; so every
step is compared, whatever happened before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """A prompt and the reference's greedy continuation of T tokens.

    Attributes:
        prompt: token ids.
        tokens: T greedy token ids.
        logprobs: T natural log-probabilities of ``tokens``.
        top: T mappings, the most likely tokens of each step and their log-probabilities.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    logprobs: Sequence[float]
    top: Sequence[Mapping[int, float]]


@dataclass(frozen=True)
class Answer:
    """What vLLM did with a :class:`Reference`.

    Attributes:
        tokens: T greedy token ids of vLLM's own.
        logprobs: their log-probabilities.
        read_logprobs: log-probabilities of the *reference's* tokens, read as part of a prompt.
        read_greedy: the token that was most likely in each of those steps.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    read_logprobs: Sequence[float]
    read_greedy: Sequence[int]


@dataclass(frozen=True)
class Verdict:
    """How an answer compares.

    Attributes:
        prompt_tokens: length of the prompt.
        steps: tokens generated, T.
        equal_steps: greedy tokens that are equal before the first difference.
        tie: whether the first difference is a near-tie: the reference holds the two tokens' log-
            probabilities to be closer than the tolerance, so that either is right.
        decode_error: largest difference of log-probabilities over the equal steps; NaN counts as
            infinite.
        read_error: the same over all steps, reference tokens read as a prompt.
        failures: what is wrong, a sentence each; empty if the two agree.
    """

    prompt_tokens: int
    steps: int
    equal_steps: int
    tie: bool
    decode_error: float
    read_error: float
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the two agree, near-ties apart."""
        return not self.failures


def compare(reference: Reference, answer: Answer, tolerance: float) -> Verdict:
    """Judge ``answer``.

    Args:
        reference: with T steps.
        answer: to the same prompt, with as many.
        tolerance: largest difference of log-probabilities that counts as agreement; also the gap
            below which two tokens tie.

    Raises:
        ValueError: if the two have different numbers of steps.
    """
    steps = len(reference.tokens)
    for name in ("tokens", "logprobs", "read_logprobs", "read_greedy"):
        if len(getattr(answer, name)) != steps:
            raise ValueError(f"{name}: {len(getattr(answer, name))} steps instead of {steps}")
    failures = []
    equal = next(
        (i for i in range(steps) if reference.tokens[i] != answer.tokens[i]),
        steps,
    )
    decode_error = _largest_difference(reference.logprobs[:equal], answer.logprobs[:equal])
    if not decode_error <= tolerance:
        failures.append(f"log-probabilities differ by {decode_error:.2g} while decoding")
    tie = equal < steps and _tied(reference, equal, answer.tokens[equal], tolerance)
    if equal < steps and not tie:
        failures.append(
            f"greedy token {equal} is {answer.tokens[equal]} instead of {reference.tokens[equal]}"
        )
    read_error = _largest_difference(reference.logprobs, answer.read_logprobs)
    if not read_error <= tolerance:
        failures.append(f"log-probabilities differ by {read_error:.2g} while reading")
    for step, token in enumerate(answer.read_greedy):
        if token != reference.tokens[step] and not _tied(reference, step, token, tolerance):
            failures.append(
                f"most likely token {step} is {token} instead of {reference.tokens[step]} "
                "while reading"
            )
            break
    return Verdict(
        prompt_tokens=len(reference.prompt),
        steps=steps,
        equal_steps=equal,
        tie=tie,
        decode_error=decode_error,
        read_error=read_error,
        failures=tuple(failures),
    )


def _tied(reference: Reference, step: int, other: int, tolerance: float) -> bool:
    rival = reference.top[step].get(other)
    return rival is not None and reference.logprobs[step] - rival < tolerance


def _largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    if any(math.isnan(difference) for difference in differences):
        return math.inf
    return max(differences, default=0.0)
