"""One streamed request over the OpenAI API, timed token by token, at little cost.

A hundred streams bring thousands of events a second, so an event is looked at with two searches in
its bytes; only the one that carries ``usage`` is parsed.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

from gevent import GreenletExit
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError

from benchmarks.serving.records import CUT, Record

TIMEOUT_S = 1800.0
_BLOCK = 16384
_EVENT_END = b"\n\n"
_DONE = b"data: [DONE]"
_USAGE = b'"usage":{'
_NO_CHOICE = b'"choices":[]'
_ROLE = b'"role":'


def connect(host: str) -> HTTPClient:
    """A connection for one user, opened now so that no request is timed with its opening, and kept
    alive between requests."""
    client = HTTPClient.from_url(
        host,
        concurrency=1,
        block_size=_BLOCK,
        connection_timeout=TIMEOUT_S,
        network_timeout=TIMEOUT_S,
    )
    with suppress(OSError, HTTPConnectionClosed, HTTPParseError):
        client.get("/health").read()
    return client


def run_stream(
    client: HTTPClient, path: str, payload: bytes, record: Record, *, key: str | None = None
) -> None:
    """Send ``payload`` and read the answer to its end, into ``record``; so are errors."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    record.sent_s = time.monotonic()
    try:
        response = client.post(path, body=payload, headers=headers)
        if response.status_code != 200:
            text = bytes(response.read()).decode(errors="replace")
            record.error = f"HTTP {response.status_code}: {_reason(text)}"
        else:
            _read_events(response, record)
    except GreenletExit:
        record.error = CUT
        raise
    except (OSError, HTTPConnectionClosed, HTTPParseError) as error:
        record.error = f"{type(error).__name__}: {error}"
    finally:
        record.end_s = time.monotonic()
        if record.error:
            client.close()  # never reuse a connection that is in an unknown state


def _read_events(response: Any, record: Record) -> None:
    now, readline, gaps = time.monotonic, response.readline, record.gaps_s
    last = 0.0
    while event := readline(_EVENT_END):
        moment = now()
        if event.startswith(_DONE):
            response.read()
            break
        if _USAGE in event:
            _note_usage(event, record)
        # An event without a choice carries usage only; chat's first one carries the role only.
        if _NO_CHOICE in event or _ROLE in event:
            continue
        if event.startswith((b'data: {"error"', b'{"error"')):
            record.error = f"in the stream: {_reason(event.decode(errors='replace'))}"
            response.release()
            return
        if last:
            gaps.append(moment - last)
        else:
            record.first_s = moment
        record.last_s = last = moment
    else:
        record.error = "the stream ended without [DONE]"
    if not record.error and not record.output_tokens:
        record.error = "the server counted no output tokens (usage)"


def _note_usage(event: bytes, record: Record) -> None:
    usage = json.loads(event.removeprefix(b"data: "))["usage"]
    record.prompt_tokens = usage["prompt_tokens"]
    record.output_tokens = usage["completion_tokens"]


def _reason(text: str) -> str:
    """An error's message, from OpenAI's envelope where there is one; one line."""
    try:
        data = json.loads(text.removeprefix("data: "))
        message = data.get("error", data).get("message", text)
    except (ValueError, AttributeError):
        message = text
    return " ".join(str(message).split())[:300]
