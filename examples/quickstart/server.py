"""``vllm serve`` on a free port, with settings that start quickly on a small CPU."""

from __future__ import annotations

import http.client
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from examples.quickstart.processes import CommandFailed, free_port, process_group, vllm_command

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a share of the machine's memory
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # Nothing is compiled for a handful of tokens.
    "TORCHDYNAMO_DISABLE": "1",
}
ARGUMENTS = ("--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16")
START_SECONDS = 300.0


@contextmanager
def serve(
    model: Path,
    name: str,
    *,
    log: Path,
    arguments: Sequence[str] = (),
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[str]:
    """Serve ``model`` while the block runs.

    Args:
        model: an edited checkpoint (or any model that vLLM serves).
        name: what requests call it.
        log: file for the server's output.
        arguments: more of ``vllm serve``.
        on_wait: called with the seconds gone by, twice a second until the server is ready.

    Yields:
        The base URL for an OpenAI client.

    Raises:
        CommandFailed: if the server ends, or is not ready in time.
    """
    port = free_port()
    command = [*vllm_command(), "serve", str(model), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *ARGUMENTS, *arguments]
    with process_group(command, log=log, env=ENVIRONMENT) as process:
        try:
            _wait_until_ready(process, port, on_wait)
        except TimeoutError as error:
            raise CommandFailed(command, -1, log) from error
        if process.returncode is not None:
            raise CommandFailed(command, process.returncode, log)
        yield f"http://127.0.0.1:{port}/v1"


def _wait_until_ready(
    process: subprocess.Popen[bytes], port: int, on_wait: Callable[[float], None]
) -> None:
    """Return once the server answers or has ended."""
    started = time.monotonic()
    while process.poll() is None and not _healthy(port):
        waited = time.monotonic() - started
        if waited > START_SECONDS:
            raise TimeoutError
        on_wait(waited)
        time.sleep(0.5)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
