"""Conversations under the tokenizer's own chat template, and which tokens the assistant wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jinja2 import TemplateError

from vllm_attnedit.errors import AttnEditError

Message = dict[str, str]
# The names that common chat data sets use.
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
CONVERSATION_FIELDS = ("messages", "conversations", "conversation")


def read_messages(record: Any, column: str | None, where: str) -> list[Message]:
    """The messages of a record, in the ``role``/``content`` or the ``from``/``value`` spelling.

    Messages of unknown roles and empty ones are left out; so is everything before the first user or
    system message, which no template expects. An empty list means: nothing to learn from.

    Args:
        record: a decoded JSON record.
        column: the field that holds the messages; ``None`` for the usual ones.
        where: how messages name the record.

    Raises:
        AttnEditError: if the record has no such field.
    """
    fields = (column,) if column else CONVERSATION_FIELDS
    turns = None
    if isinstance(record, Mapping):
        turns = next((record[name] for name in fields if name in record), None)
    elif isinstance(record, list):
        turns = record
    if not isinstance(turns, list):
        raise AttnEditError(
            where, f"no field {' or '.join(fields)}", "name it as the source's column"
        )
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            continue
        role = _ROLES.get(str(turn.get("role", turn.get("from", ""))).lower())
        content = turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str) or not content.strip():
            continue
        if not messages and role == "assistant":
            continue
        messages.append({"role": role, "content": content})
    return messages if any(m["role"] == "assistant" for m in messages) else []


def tokenize_chat(
    tokenizer: Any, messages: list[Message], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a conversation, and which of them the assistant wrote.

    The end-of-turn token after an answer counts as the assistant's: it has to learn to stop. An
    answer that the template rewrites, such as one whose reasoning it drops, is not marked: it is
    not what the assistant would have said there.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: as :func:`read_messages` returns them, with at least one answer.
        where: how messages name the conversation.

    Returns:
        ids (T,) int64 and flags (T,) bool.

    Raises:
        AttnEditError: if the tokenizer has no template, or one that refuses the conversation.
    """
    text = _render(tokenizer, messages, False, where)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [_render(tokenizer, messages[:i], True, where) for i in turns]
    starts = [len(prompt) if text.startswith(prompt) else None for prompt in prompts]
    spans: list[tuple[int, int]] = []
    for place, (turn, start) in enumerate(zip(turns, starts)):
        if start is None:
            continue
        content = messages[turn]["content"].strip()
        following = next((s for s in starts[place + 1 :] if s is not None), len(text))
        found = text.find(content, start, following)
        # Behind a special token, such as the end of this turn, somebody else speaks.
        between = text[start : max(found, start)]
        if found >= 0 and not any(token in between for token in tokenizer.all_special_tokens):
            spans.append((start, found + len(content)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    answers = np.zeros(len(ids), dtype=bool)
    special = np.isin(ids, tokenizer.all_special_ids)
    for start, end in spans:
        inside = (offsets[:, 1] > start) & (offsets[:, 0] < end)
        answers |= inside
        # Space that the answer or the template has before the end of the turn belongs to it.
        stop = len(text) - len(text[end:].lstrip())
        behind, after = (int(i) for i in np.searchsorted(offsets[:, 0], (end, stop)))
        if after < len(ids) and special[after]:
            answers[behind : after + 1] = True
    return ids, answers


def _render(tokenizer: Any, messages: list[Message], prompt: bool, where: str) -> str:
    if not tokenizer.chat_template:
        fix = "use a source of kind text, or a teacher whose tokenizer has a chat template"
        raise AttnEditError(where, "the tokenizer has no chat template", fix)
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        raise AttnEditError(where, error, "mend the conversation or leave it out") from error
    return text
