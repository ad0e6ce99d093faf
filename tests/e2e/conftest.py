"""The real model, edited once and served once for all end-to-end tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from examples.quickstart.server import serve
from examples.quickstart.teacher import fetch_teacher

MODEL = "smollm2"
BIN = Path(sys.executable).parent


def attnedit(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run(
        [BIN / "attnedit", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="session")
def teacher() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return fetch_teacher()


def edit(teacher: Path, out: Path, *arguments: object) -> Path:
    done = attnedit("edit", teacher, out, "--init", "inherit", *arguments)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def gateswa(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, so that comparisons can be tight."""
    out = tmp_path_factory.mktemp("edited") / "gateswa"
    return edit(teacher, out, "--target", "gateswa", "--dtype", "float32")


@pytest.fixture(scope="session")
def mla(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edited") / "mla"
    return edit(teacher, out, "--target", "mla", "--dtype", "float32")


@pytest.fixture(scope="session")
def client(gateswa: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    os.environ["NO_PROXY"] = "127.0.0.1"
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    # With an empty folder the engine's own gauges reach the server's /metrics.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path_factory.mktemp("gauges"))
    # By itself vLLM would round to bfloat16, in which this small model may answer otherwise.
    arguments = ("--dtype", "float32")
    with serve(gateswa, MODEL, log=log, arguments=arguments) as base_url:
        del os.environ["PROMETHEUS_MULTIPROC_DIR"]
        yield OpenAI(base_url=base_url, api_key="none", timeout=300.0, max_retries=0)
