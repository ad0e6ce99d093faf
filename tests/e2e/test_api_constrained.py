"""Structured output and tool calls over the API, on served edits of the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from examples.quickstart.server import serve
from tests.e2e.conftest import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "river": {"type": "string", "maxLength": 12},
        "bridges": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "river", "bridges"],
    "additionalProperties": False,
}
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two digits.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 9},
                "b": {"type": "integer", "minimum": 0, "maximum": 9},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
QUESTION: Any = [{"role": "user", "content": "What is 3 + 4? Use the tool."}]


@pytest.fixture(scope="module")
def latent_client(mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    log = tmp_path_factory.mktemp("serve-mla") / "serve.log"
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with serve(mla, MODEL, log=log, arguments=tools) as base_url:
        yield OpenAI(base_url=base_url, api_key="none", timeout=300.0, max_retries=0)


@pytest.mark.parametrize("served", ["client", "latent_client"])
def test_answers_follow_a_json_schema(served: str, request: pytest.FixtureRequest):
    session: OpenAI = request.getfixturevalue(served)
    response_format: Any = {
        "type": "json_schema",
        "json_schema": {"name": "place", "schema": SCHEMA, "strict": True},
    }
    answer = session.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe the capital of France as JSON."}],
        temperature=0,
        max_tokens=120,
        response_format=response_format,
    )
    assert answer.choices[0].finish_reason == "stop"
    place = json.loads(answer.choices[0].message.content or "")
    assert set(place) == {"city", "river", "bridges"}
    assert place["city"] in ("Paris", "Rome")
    assert len(place["river"]) <= 12
    assert 0 <= place["bridges"] <= 99


def test_a_demanded_tool_is_called(latent_client: OpenAI):
    answer = latent_client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[ADD],
        tool_choice={"type": "function", "function": {"name": "add"}},
        temperature=0,
        max_tokens=120,
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "add"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"a", "b"}
    assert all(isinstance(x, int) and 0 <= x <= 9 for x in arguments.values())


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_in_the_text_is_parsed(latent_client: OpenAI, stream: bool):
    """The grammar sees to the call, which a model this small would seldom write; the parser does
    not know."""
    form = r'<tool_call>\n\{"name": "add", "arguments": \{"a": [0-9], "b": [0-9]\}\}\n</tool_call>'
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "tools": [ADD],
        "tool_choice": "auto",
        "temperature": 0,
        "max_tokens": 120,
        "extra_body": {"structured_outputs": {"regex": form}},
    }
    if stream:
        name, text = "", ""
        for event in latent_client.chat.completions.create(stream=True, **asked):
            for part in event.choices[0].delta.tool_calls or []:
                name += part.function.name or ""
                text += part.function.arguments or ""
    else:
        answer = latent_client.chat.completions.create(**asked)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert not (answer.choices[0].message.content or "").strip()
        [call] = answer.choices[0].message.tool_calls
        name, text = call.function.name, call.function.arguments
    assert name == "add"
    arguments = json.loads(text)
    assert set(arguments) == {"a", "b"}
