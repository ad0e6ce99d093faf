"""Options, traces and requests: seeded, exact in length, and refused with a place to look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.serving.options import load_options
from benchmarks.serving.plan import Plan
from benchmarks.serving.traces import read_sessions, read_trace
from benchmarks.serving.workload import Workload
from vllm_attnedit.errors import AttnEditError

VOCABULARY = 32_000


def plan_of(**fields: Any) -> Plan:
    return Plan(Workload(name="w", levels=(1,), **fields), VOCABULARY, 4096)


def prompt_of(plan: Plan, number: int) -> list[int]:
    prompt: list[int] = plan.ask(number).body["prompt"]
    return prompt


def test_random_prompts_share_nothing_and_come_again() -> None:
    plan = plan_of(prompt_tokens=300, output_tokens=7, seed=3)
    first, second = prompt_of(plan, 0), prompt_of(plan, 1)
    assert len(first) == len(second) == 300
    assert first[:16] != second[:16]
    assert prompt_of(plan_of(prompt_tokens=300, output_tokens=7, seed=3), 0) == first
    assert prompt_of(plan_of(prompt_tokens=300, output_tokens=7, seed=4), 0) != first
    assert all(1000 <= token < VOCABULARY - 1000 for token in first)
    body = plan.ask(0).body
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (7, True, 0)


def test_turns_continue_their_conversation() -> None:
    plan = plan_of(
        kind="multi_turn", prefix_tokens=100, prompt_tokens=20, output_tokens=10, turns=3
    )
    turns = [prompt_of(plan, number) for number in range(6)]
    assert [len(turn) for turn in turns] == [120, 150, 180] * 2
    assert turns[1][:120] == turns[0]
    assert turns[2][:150] == turns[1]
    assert turns[3][:100] == turns[0][:100]
    assert turns[3][100:] != turns[0][100:]


def test_equal_blocks_of_a_trace_are_equal_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1000, "output_length": 9, "hash_ids": [0, 1]},
        {"timestamp": 3000, "input_length": 1100, "output_length": 0, "hash_ids": [0, 2, 3]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    plan = plan_of(kind="trace", load="trace", path=path)
    first, second = prompt_of(plan, 0), prompt_of(plan, 1)
    assert (len(first), len(second)) == (1000, 1100)
    assert first[:512] == second[:512]
    assert first[512:] != second[512:1000]
    assert plan.ask(1).output_tokens == 1
    assert plan.arrivals(2).tolist() == [0, 1.5]


def test_poisson_arrivals_have_the_rate() -> None:
    times = plan_of(load="poisson", requests=4000).arrivals(5.0)
    assert np.all(np.diff(times) > 0)
    assert times[-1] / 4000 == pytest.approx(0.2, rel=0.05)


def test_azure_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:04.0319600,3180,8\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
    )
    first, second = read_trace(path)
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0, 4808, 10)
    assert second.arrival_s == pytest.approx(0.052)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("t.jsonl", '{"timestamp": 0, "input_length": 5, "output_length": 1}\nnonsense', "line 2"),
        ("t.jsonl", '\n{"timestamp": 0, "input_length": -5, "output_length": 1}', "line 2"),
        ("t.jsonl", '{"timestamp": 0, "output_length": 1}', "no 'input_length'"),
        ("t.jsonl", "[]", "line 1"),
        (
            "t.jsonl",
            '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}',
            "2 hash_ids for 5 tokens",
        ),
        ("t.jsonl", "", "holds no request"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2"),
        ("t.csv", "a,b\n1,2\n", "line 2"),
        ("t.txt", "", ".jsonl"),
    ],
)
def test_malformed_traces_are_refused_by_line(
    tmp_path: Path, name: str, text: str, place: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(AttnEditError) as refused:
        read_trace(tmp_path / name)
    assert place in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttnEditError, match="can be read"):
        read_trace(tmp_path / "none.jsonl")


def test_sessions(tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    case = {"id": "a", "messages": [{"role": "user", "content": "word " * 100}]}
    long = {"id": "b", "messages": [{"role": "user", "content": "word " * 9000}]}
    path.write_text(json.dumps({"cases": [long, case]}))
    assert [session.name for session in read_sessions(path)] == ["a", "b"]
    plan = plan_of(kind="sessions", path=path, output_tokens=5)
    assert [session.name for session in plan.sessions] == ["a"]  # the other one cannot fit
    ask = plan.ask(3)
    assert ask.path == "/v1/chat/completions"
    assert ask.body["messages"] == case["messages"]
    path.write_text(json.dumps({"cases": [case, {"id": "b"}]}))
    with pytest.raises(AttnEditError, match="case 1"):
        read_sessions(path)


CONFIG = """
name: test
model: smollm2
systems: [{name: teacher, edit: full}, {name: ours, edit: gateswa}]
server: {max_model_len: 2048}
workloads: [{name: chat, levels: [1, 2]}]
"""


def test_options_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    options = load_options(path)
    assert [system.name for system in options.systems] == ["teacher", "ours"]
    assert options.workloads[0].levels == (1, 2)
    assert options.goal.ttft_s == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("levels: [1, 2]", "levels: [0]", "above 0"),
        ("levels: [1, 2]", "levels: [1.5]", "whole numbers"),
        ("levels: [1, 2]", "levels: [1], kind: trace", "path"),
        ("levels: [1, 2]", "levels: [1], load: trace", "kind: trace"),
        ("levels: [1, 2]", "levels: [1], systems: [other]", "names no system"),
        ("name: ours", "name: teacher", "name of its own"),
        ("max_model_len: 2048", "max_model_len: 2048, gpu_memory_utilization: 2", "less than"),
        ("max_model_len: 2048", "max_model_len: 2048, spelling: 1", "server.spelling"),
        ("model: smollm2", "model: {teacher: x}", "folder for each"),
        ("name: test", "name: test\nmeasure: {crosscheck: chat}", "one of chat:1, chat:2"),
        ("name: test", "name: [", "mend the YAML"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.replace(old, new))
    with pytest.raises(AttnEditError) as refused:
        load_options(path)
    assert said in str(refused.value)
    assert str(path) in str(refused.value)


def test_requests_that_cannot_fit_are_refused() -> None:
    with pytest.raises(AttnEditError, match="5000 tokens"):
        plan_of(prompt_tokens=4000, output_tokens=1000)


CONFIGS = Path(__file__).parents[3] / "benchmarks/serving/configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_here_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads, and each of its requests fits its server; traces come from the user."""
    monkeypatch.setattr("benchmarks.serving.options.count_devices", lambda: 1)
    options = load_options(path)
    edits = [system.edit for system in options.systems]
    assert edits[0] == "full" or "full" not in edits  # where the teacher is served, it is control
    for workload in options.workloads:
        if workload.path is None:
            assert Plan(workload, 151_936, options.server.max_model_len).ask(0).body
