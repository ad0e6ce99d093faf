"""The load generator against servers whose delays are known."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.serving.generator import Generator
from benchmarks.serving.plan import Plan
from benchmarks.serving.records import CUT
from benchmarks.serving.scraping import read_sample
from benchmarks.serving.workload import Workload
from examples.quickstart.processes import free_port
from tests.unit.serving.conftest import LOCUSTFILE, RunLoad, StartFake

pytestmark = pytest.mark.alone

SHORT = ("--prompt-tokens", "50", "--output-tokens", "20")


def test_known_delays_come_out_within_two_milliseconds(fake: StartFake, load: RunLoad) -> None:
    """Every answer is late by what other processes on the machine held up; the quickest one tells
    what the harness itself adds."""
    server = fake("--ttft", "0.1", "--tpot", "0.02")
    for api in ("completions", "chat"):
        done = load(server.url, "-u", "3", "-t", "5s", "--api", api, *SHORT)
        assert done.code == 0, done.output
        assert len(done.whole) >= 6
        assert all((r.prompt_tokens, r.output_tokens) == (50, 20) for r in done.whole)
        assert all(len(r.gaps_s) == 19 for r in done.whole)
        assert 0.1 <= min(r.ttft_s for r in done.whole) < 0.102
        assert abs(median(r.tpot_s or 0 for r in done.whole) - 0.02) < 0.002
        assert abs(median(g for r in done.whole for g in r.gaps_s) - 0.02) < 0.002
        assert 0.48 <= min(r.latency_s for r in done.whole) < 0.484


def test_waiting_in_the_server_is_part_of_ttft(fake: StartFake, load: RunLoad) -> None:
    """Six at once where two run: three rounds of 0.2 s."""
    server = fake("--ttft", "0.1", "--tpot", "0.01", "--slots", "2")
    arguments = ("-u", "6", "--load", "burst", "--prompt-tokens", "50", "--output-tokens", "11")
    times = sorted(record.ttft_s for record in load(server.url, *arguments).records)
    assert np.allclose(times, [0.1, 0.1, 0.3, 0.3, 0.5, 0.5], atol=0.08)


def test_a_closed_load_keeps_its_users_asking(fake: StartFake, load: RunLoad) -> None:
    server = fake("--ttft", "0.1", "--tpot", "0.01")
    done = load(server.url, "-u", "3", "-t", "4s", *SHORT)
    assert {record.error for record in done.records} <= {"", CUT}
    seconds = max(r.end_s for r in done.records) - min(r.sent_s for r in done.records)
    assert 0.3 * 3 * seconds / 0.29 < len(done.whole) + 3 <= 3 * (seconds / 0.29 + 2)
    assert sum(record.error == CUT for record in done.records) <= 3
    numbers = [record.number for record in done.records]
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) == set(range(max(numbers) + 1)) or max(numbers) < len(numbers) + 3
    assert 2 < done.costs[0].streams < 3.1
    assert "TTFT" in done.output


def test_two_processes_share_the_work(fake: StartFake, load: RunLoad) -> None:
    server = fake("--ttft", "0.05", "--tpot", "0.01")
    done = load(server.url, "-u", "4", "--load", "burst", "--processes", "2", *SHORT)
    assert sorted(record.number for record in done.whole) == [0, 1, 2, 3]
    assert len(done.costs) == 2


def test_open_loads_send_when_due(fake: StartFake, load: RunLoad) -> None:
    """Poisson arrivals of the plan, whatever the server does."""
    server = fake("--ttft", "0.5", "--tpot", "0.01", "--slots", "2")
    arguments = ("--load", "poisson", "--rate", "20", "--requests", "20", "--output-tokens", "5")
    done = load(server.url, "-u", "1", *arguments, "--prompt-tokens", "50", "--seed", "7")
    assert len(done.whole) == 20, done.output
    plan = Plan(Workload(name="w", load="poisson", levels=(20,), requests=20, seed=7), 32_000, 4096)
    sent = np.array([record.sent_s for record in done.records])
    due = plan.arrivals(20)
    late = sent - sent[0] - due + due[0]
    assert np.median(np.abs(late)) < 0.02
    assert max(record.late_s for record in done.records) < 0.2


def test_a_trace_is_replayed_faster(fake: StartFake, load: RunLoad, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"timestamp": 500, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}\n'
        '{"timestamp": 2500, "input_length": 5, "output_length": 4, "hash_ids": [0]}\n'
    )
    server = fake("--ttft", "0.01", "--tpot", "0.01")
    done = load(server.url, "-u", "1", "--kind", "trace", "--trace", str(trace), "--load", "trace",
                "--rate", "4")  # fmt: skip
    first, second = done.whole
    assert (first.prompt_tokens, second.prompt_tokens) == (600, 5)
    assert (first.output_tokens, second.output_tokens) == (3, 4)
    assert abs(second.sent_s - first.sent_s - 0.5) < 0.1


def test_a_run_lasts_as_long_as_it_was_told_to(fake: StartFake, load: RunLoad) -> None:
    """From when everything is loaded, and not since the process began."""
    server = fake("--ttft", "0.01", "--tpot", "0.01")
    done = load(server.url, "-u", "2", "-t", "3s", *SHORT)
    assert done.code == 0, done.output
    assert 2.5 < max(r.end_s for r in done.records) - min(r.sent_s for r in done.records) < 3.5


def test_a_run_without_an_answer_does_not_pass(fake: StartFake, load: RunLoad) -> None:
    server = fake("--ttft", "30")
    done = load(server.url, "-u", "2", "-t", "1s", *SHORT)
    assert done.code == 1
    assert "no request was answered" in done.output


def test_every_run_asks_something_new(fake: StartFake, load: RunLoad) -> None:
    """Unless a seed is given: the server has the prompts of an earlier run in its cache."""
    server = fake("--ttft", "0.01", "--tpot", "0.001")
    seeds = []
    for arguments in ((), ("--processes", "2"), ("--seed", "7")):
        done = load(server.url, "-u", "2", "--load", "burst", *arguments, *SHORT)
        assert sorted(record.number for record in done.whole) == [0, 1], done.output
        seeds += [line.split()[-1] for line in done.output.splitlines() if "--seed" in line]
    assert len(set(seeds)) == len(seeds) == 2


def test_no_request_is_asked_twice_when_users_come_later() -> None:
    plan = Plan(Workload(name="w", levels=(2,), turns=3), 32_000, 8192)
    generators = [Generator(plan, "model", index, 2) for index in range(2)]
    asked = []
    for generator in generators:
        users = [generator.numbers()]
        asked += [next(users[0]) for _ in range(4)]
        users.append(generator.numbers())
        asked += [next(user) for _ in range(5) for user in users]
        generator.close()
    assert len(set(asked)) == len(asked)
    assert asked[:3] == [0, 1, 2]


def test_errors_are_errors(fake: StartFake, load: RunLoad, tmp_path: Path) -> None:
    server = fake()
    wrong = load(server.url, "-u", "2", "--load", "burst", "--model-name", "gpt", *SHORT)
    assert all("`gpt` does not exist" in record.error for record in wrong.records)
    assert wrong.code == 1
    nobody = load("http://127.0.0.1:9", "-u", "2", "--load", "burst", *SHORT)
    assert nobody.code == 2
    assert "OpenAI-compatible" in nobody.output
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 4}\n{"time": 1}\n')
    bad = load(server.url, "-u", "1", "--kind", "trace", "--trace", str(trace))
    assert bad.code == 2
    assert "line 2" in bad.output


def test_a_server_that_dies_leaves_failed_requests(fake: StartFake, load: RunLoad) -> None:
    """None of its requests counts as whole, and the generator survives."""
    server = fake("--ttft", "0.1", "--tpot", "0.1")

    def kill_while_all_are_answered() -> None:
        with httpx.Client(base_url=server.url) as client:
            while read_sample(client).prompted < 3 * 50:
                time.sleep(0.1)
        server.process.kill()

    threading.Thread(target=kill_while_all_are_answered, daemon=True).start()
    done = load(server.url, "-u", "3", "--load", "burst", "--prompt-tokens", "50",
                "--output-tokens", "500")  # fmt: skip
    assert len(done.records) == 3, done.output
    assert not done.whole
    assert all(record.failed for record in done.records)
    assert all(record.first_s for record in done.records)


def test_the_web_ui_starts_and_stops_a_load(fake: StartFake) -> None:
    """What a person does in the browser, by the requests that it sends."""
    server = fake("--ttft", "0.05", "--tpot", "0.01")
    port = free_port()
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", server.url]
    command += ["--web-host", "127.0.0.1", "--web-port", str(port), "--output-tokens", "10"]
    locust = subprocess.Popen(command)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as browser:
            page = _until(lambda: browser.get("/").text)
            assert "prompt_tokens" in page  # the load's options can be chosen there
            assert "api_key" not in page
            form = {"user_count": "2", "spawn_rate": "2", "host": server.url}
            assert browser.post("/swarm", data=form).json()["success"]

            def rows() -> dict[str, Any]:
                stats = browser.get("/stats/requests").json()["stats"]
                return {row["method"]: row for row in stats if row["num_requests"] >= 4}

            shown = _until(lambda: found if {"TTFT", "POST"} <= set(found := rows()) else None)
            assert {"TTFT", "TPOT", "ITL", "POST"} <= set(shown)
            assert shown["TTFT"]["num_failures"] == 0
            assert 50 <= shown["TTFT"]["median_response_time"] < 100
            assert browser.post("/stop").json()["success"]
    finally:
        locust.terminate()
        locust.wait()


def _until(ask: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 40
    while True:
        with suppress(httpx.TransportError):
            if answer := ask():
                return answer
        assert time.monotonic() < deadline
        time.sleep(0.2)
