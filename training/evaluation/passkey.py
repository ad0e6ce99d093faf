"""Passkey retrieval: can a model still say a number that it read long ago?

A five-digit number hides at some depth of filler text (after Mohtashami and Jaggi, arXiv
2305.16300). Found means that every token of the number is the likeliest one, given the prompt and
the tokens of the number before it: what greedy decoding would write.

Shapes: R trials, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.config import PasskeyConfig
from training.data.packing import shuffled
from training.evaluation.intervals import Estimate, share_of
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.hf import AttnEditForCausalLM

_OPENING = "An important number is hidden in this text. Read it and keep the number in mind.\n\n"
_FILLER = (
    "Rain fell on the hills. A cart went by. Somebody closed a window. Later the sky was clear. "
)
_KEY = "The pass key is {0}. Keep it in mind: {0} is the pass key. "
_QUESTION = "\n\nWhat is the pass key? The pass key is"


def passkey_prompts(
    tokenizer: Any, length: int, depth: float, trials: int
) -> tuple[Tensor, list[int]]:
    """Prompts with their answers.

    Args:
        tokenizer: of the model.
        length: of prompt and answer, in tokens.
        depth: of the number in the filler: 0 first, 1 last.
        trials: prompts.

    Returns:
        ids (R, T) that end with the answer, and the length of each answer in tokens.

    Raises:
        AttnEditError: if the frame alone is longer than ``length``.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    start = list(tokenizer("")["input_ids"]) + encode(_OPENING)
    filler, question = encode(_FILLER), encode(_QUESTION)
    rows, answers = [], []
    for number in shuffled(90_000, length, round(1000 * depth))[:trials] + 10_000:
        key, answer = encode(_KEY.format(number)), encode(f" {number}")
        room = length - len(start) - len(key) - len(question) - len(answer)
        if room < 0:
            fix = f"give at least {length - room}: the question alone takes that many tokens"
            raise AttnEditError("evaluate.passkey.lengths", length, fix)
        hay = (filler * (room // len(filler) + 1))[:room]
        # Between two sentences, unless there is no room for one.
        cut = min(room, round(depth * room / len(filler)) * len(filler))
        rows.append(start + hay[:cut] + key + hay[cut:] + question + answer)
        answers.append(len(answer))
    return torch.tensor(rows), answers


@torch.no_grad()
def passkey_found(
    model: AttnEditForCausalLM, ids: Tensor, answers: list[int], tokens: int = 1 << 15
) -> Estimate:
    """Share of the prompts whose number the model finds, with Wilson's interval."""
    head, hits = model.lm_head.weight, 0
    rows = max(1, tokens // ids.shape[1])
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows].to(head.device)
        states = model.model(input_ids=part, use_cache=False).last_hidden_state
        for row, state, size in zip(part, states, answers[start : start + rows]):
            said = (state[-size - 1 : -1] @ head.t()).argmax(-1)
            hits += bool((said == row[-size:]).all())
    return share_of(hits, len(ids))


def run_passkey(
    model: AttnEditForCausalLM, tokenizer: Any, config: PasskeyConfig
) -> dict[tuple[int, float], Estimate]:
    """Share found, by length and depth."""
    return {
        (length, depth): passkey_found(
            model, *passkey_prompts(tokenizer, length, depth, config.trials)
        )
        for length in config.lengths
        for depth in config.depths
    }
