"""``attnedit kv --server`` against a server that answers with fixed pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.unit.command import Attnedit, attnedit
from tests.unit.smollm2 import SMOLLM2, config_of, teacher_config

__all__ = ["attnedit"]

RECORDED = Path(__file__).parent / "recorded"
Pages = dict[str, str | int]


@pytest.fixture
def answering() -> Iterator[Callable[[Pages], str]]:
    """Serve pages (or a status) by path; returns the address."""
    servers: list[HTTPServer] = []

    def start(pages: Pages) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = pages.get(self.path, 404)
                self.send_response(page if isinstance(page, int) else 200)
                self.end_headers()
                self.wfile.write(page.encode() if isinstance(page, str) else b"")

            def log_message(self, *arguments: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def pages(root: object) -> Pages:
    models = json.dumps({"data": [{"id": "m", "root": str(root)}]})
    return {
        "/metrics": (RECORDED / "metrics_measured.txt").read_text(),
        "/v1/models": models,
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config_of().save_pretrained(tmp_path / "edited")
    return tmp_path / "edited"


def test_command(attnedit: Attnedit, answering: Any, checkpoint: Path) -> None:
    address = answering(pages(checkpoint))
    for url in (address, f"http://{address}/v1", f"http://{address}/"):
        done = attnedit("kv", "--server", url, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["running"] == 12
    shown = attnedit("kv", "--server", address).out
    assert "12 running" in shown
    assert "measured by the engine" in shown
    assert "by formula" in shown


def test_command_with_a_named_checkpoint(
    attnedit: Attnedit, answering: Any, checkpoint: Path
) -> None:
    """Where the server's own path is not on this machine."""
    address = answering(pages("/elsewhere/model"))
    assert "is not to be found here" in attnedit.refused("kv", "--server", address)
    assert attnedit("kv", checkpoint, "--server", address).code == 0
    locked: Pages = {**pages(checkpoint), "/v1/models": 401}
    assert "name the checkpoint" in attnedit.refused("kv", "--server", answering(locked))


def test_pages_that_cannot_be_packed_are_told(
    attnedit: Attnedit, answering: Any, tmp_path: Path
) -> None:
    config_of(num_hidden_layers=29).save_pretrained(tmp_path / "odd")
    address = answering(pages(tmp_path / "odd"))
    command = ("kv", "--server", address, "--pages", "packed")
    line = "pages are not packed: 25 window layers do not divide over 4 full ones"
    assert f"warning: {line}" in attnedit(*command).out.splitlines()
    report = json.loads(attnedit(*command, "--json").out)
    assert (report["pages"], report["warnings"]) == ("separate", [line])
    assert "warning" not in attnedit("kv", "--server", address).out


def test_watch_reads_until_interrupted(
    attnedit: Attnedit, answering: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("vllm_attnedit.cli.kv_live.time.sleep", sleep)
    done = attnedit("kv", "--server", answering(pages(checkpoint)), "--watch", "0.5", "--json")
    assert done.code == 130
    assert [json.loads(line)["running"] for line in done.out.splitlines()] == [12] * 3
    assert slept == [0.5] * 3


def test_refusals(attnedit: Attnedit, answering: Any, tmp_path: Path) -> None:
    assert "cannot be reached" in attnedit.refused("kv", "--server", "127.0.0.1:9")
    assert "running vLLM server" in attnedit.refused("kv", "--server", "ftp://host")
    other = answering({"/metrics": "python_info 1.0\n"})
    assert "no vLLM metrics" in attnedit.refused("kv", "--server", other)
    assert "no vLLM metrics" in attnedit.refused("kv", "--server", answering({}))
    teacher_config(SMOLLM2).save_pretrained(tmp_path / "teacher")
    plain = answering(pages(tmp_path / "teacher"))
    assert "not an edited model" in attnedit.refused("kv", "--server", plain)
    assert "seconds > 0" in attnedit.refused("kv", "--server", plain, "--watch", "0")
    assert "with --server" in attnedit.refused("kv", tmp_path / "teacher", "--watch", "1")
    assert "CHECKPOINT" in attnedit.refused("kv")


def test_options_are_named(attnedit: Attnedit, answering: Any, checkpoint: Path) -> None:
    address = answering(pages(checkpoint))
    assert attnedit.refused("kv", "--server", address, "--tp", "2").startswith("attnedit: --tp")
    refused = attnedit.refused("kv", "--server", address, "--kv-dtype", "int3")
    assert refused.startswith("attnedit: --kv-dtype")


def test_what_a_server_decides_itself_is_refused(attnedit: Attnedit) -> None:
    server = ("kv", "--server", "127.0.0.1:9")
    for option, value in (("--length", "999"), ("--memory", "foo"), ("--pp", "2")):
        line = attnedit.refused(*server, option, value)
        assert line.startswith(f"attnedit: {option}: ")
        assert line.endswith("leave it out, or --server")
    assert "one number" in attnedit.refused(*server, "--tp", "1,2")
