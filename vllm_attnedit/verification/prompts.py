"""Prompts whose lengths try a window: shorter, equal, and several times longer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_attnedit.errors import AttnEditError

_LENGTHS_WITHOUT_WINDOW = (16, 64, 300)
_TEXT = """
The harbour master kept two ledgers. In the first she wrote the name of every ship, the hour it
came in and what it carried: salt, timber, oranges, once a printing press with three letters
missing. In the second she wrote what the captains told her over tea, which was seldom the same. A
grain ship from the north had met ice as late as May. A fishing boat had pulled up a bell with a
date older than the town. She trusted the first book when the taxes were due and the second when
somebody was lost at sea, because a list of cargo never says where the wind was strange. When the
new bridge was finished, trains took most of the trade, and the council asked her to count what
remained. She counted for a year. On Mondays there were four ships, on market days nine, and in
the week of the storm none at all, but then eleven together on the Sunday that followed. Her
report was one page long. It gave the numbers, the weights and the dues, and at the end a single
sentence: the harbour earns little, and forty families eat from it. The council read it aloud,
argued until midnight, and voted to dredge the channel after all. Years later her nephew found
both ledgers in a sea chest. He added the columns again, as she had taught him, and they were
right.
"""


def default_lengths(window: int | None, limit: int) -> list[int]:
    """Prompt lengths in tokens that try a model with this window.

    Args:
        window: keys a window layer sees; ``None`` for a model without windows.
        limit: the longest prompt that the model takes.

    Raises:
        AttnEditError: if not even one token fits.
    """
    if limit < 1:
        raise AttnEditError(
            "--tokens", "too many", "leave room for a prompt in the model's context"
        )
    if window is None:
        wanted: Sequence[int] = _LENGTHS_WITHOUT_WINDOW
    else:
        # No multiples: the long one must not end where a chunk or a block ends.
        wanted = (max(1, window // 2), window, 4 * window + 3)
    return sorted({min(length, limit) for length in wanted})


def default_prompts(
    lengths: Sequence[int], vocab_size: int, encode: Callable[[str], list[int]] | None
) -> list[list[int]]:
    """Prompts of exactly these lengths: English prose, or random tokens without a tokenizer.

    Args:
        lengths: in tokens.
        vocab_size: of the model.
        encode: text to token ids, without special tokens.
    """
    if encode is None:
        source = random.Random(0)
        return [[source.randrange(vocab_size) for _ in range(length)] for length in lengths]
    text = " ".join(_TEXT.split())
    ids = encode(text)
    # The text again where it is too short; each prompt begins elsewhere, so that none shares a
    # prefix with another and prefix caching stays out of it.
    return [
        [ids[(7 * start + i) % len(ids)] for i in range(length)]
        for start, length in enumerate(lengths)
    ]


def read_prompts(path: Path, encode: Callable[[str], list[int]], limit: int) -> list[list[int]]:
    """Token ids of a text file's lines, one prompt each; empty lines are left out.

    Args:
        path: of the file, UTF-8.
        encode: text to token ids, without special tokens.
        limit: the longest prompt that the model takes, in tokens.

    Raises:
        AttnEditError: if the file cannot be read, holds no prompt, or one that is too long.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AttnEditError("--prompts", path, f"give a text file ({error})") from error
    prompts = [encode(line) for line in lines if line.strip()]
    if not prompts:
        raise AttnEditError("--prompts", path, "write at least one prompt, a line each")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > limit:
            text = f"prompt {number} of {len(prompt)} tokens"
            raise AttnEditError("--prompts", text, f"use at most {limit} tokens a prompt")
    return prompts
