"""``vllm serve`` of one system, ended with all its processes when the block ends."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.serving.options import Server
from benchmarks.serving.spread import OPTIONS, spread_of
from benchmarks.serving.system import System
from examples.quickstart.processes import errors_or_end, free_port, process_group, vllm_command
from vllm_attnedit.errors import AttnEditError

_MEMORY = re.compile(r"out of memory|OutOfMemory|No available memory|Cannot allocate memory", re.I)
_EQUAL = (
    "--max-model-len",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--gpu-memory-utilization",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--enforce-eager",
    "--dtype",
    "--kv-cache-dtype",
    "--block-size",
    "--port",
    "--host",
)


class ServerFailed(RuntimeError):
    """The server ended or did not come up; the text is what its log says of it.

    Attributes:
        out_of_memory: whether that was the cause.
    """

    def __init__(self, log: Path) -> None:
        said = errors_or_end(log) if log.is_file() else "no log"
        super().__init__(f"{log}: {said}")
        self.out_of_memory = bool(_MEMORY.search(said))


@dataclass
class Running:
    """A server that is up."""

    base_url: str
    process: subprocess.Popen[bytes]
    command: list[str]
    log: Path

    @property
    def alive(self) -> bool:
        """Whether its process still runs."""
        return self.process.poll() is None


def check_arguments(system: System, server: Server) -> None:
    """Refuse arguments that would make one system's server unlike the others'.

    Raises:
        AttnEditError: naming the argument.
    """
    own = f"systems.{system.name}.arguments"
    for field, arguments in ((own, system.arguments), ("server.arguments", server.arguments)):
        for argument in arguments:
            name = argument.split("=")[0]
            if field == own and name in _EQUAL:
                fix = "set it under server, where it holds for all systems"
                raise AttnEditError(field, argument, fix)
            if name in OPTIONS:
                fix = "set server.devices, and tensor_parallel of a system that is to be copied"
                raise AttnEditError(field, argument, fix)


def command_of(system: System, server: Server, model: Path, name: str, port: int) -> list[str]:
    """The ``vllm serve`` command line."""
    program = server.program or vllm_command()
    command = [*program, "serve", str(model), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(server.max_model_len)]
    command += ["--max-num-seqs", str(server.max_num_seqs)]
    command += ["--max-num-batched-tokens", str(server.max_num_batched_tokens)]
    command += ["--gpu-memory-utilization", str(server.gpu_memory_utilization)]
    command += ["--dtype", server.dtype]
    caching = "--enable-prefix-caching" if server.prefix_caching else "--no-enable-prefix-caching"
    command.append(caching)
    if server.enforce_eager:
        command.append("--enforce-eager")
    command += spread_of(system, server).arguments()
    options: dict[str, str | bool] = {}
    if system.window_backend != "auto":
        options["attnedit_window_backend"] = system.window_backend
    if system.window_pages != "auto":
        options["attnedit_window_pages"] = system.window_pages
    if system.fast_prefill:
        options["attnedit_fast_prefill"] = True
    if options:
        command += ["--additional-config", json.dumps(options)]
    return [*command, *server.arguments, *system.arguments]


def environment_of(server: Server) -> dict[str, str]:
    """Variables of the server's process."""
    return {
        "VLLM_USE_V2_MODEL_RUNNER": "1" if server.v2_runner else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **server.environment,
    }


@contextmanager
def serving(system: System, server: Server, model: Path, name: str, log: Path) -> Iterator[Running]:
    """Serve ``model`` while the block runs; its port is free again afterwards.

    Raises:
        AttnEditError: if the port is taken, or the program is not there.
        ServerFailed: if it ends or is not up in time.
    """
    port = server.port or free_port()
    _require_free(port)
    command = command_of(system, server, model, name, port)
    if shutil.which(command[0]) is None:
        raise AttnEditError("server.program", command[0], "name a program that can be run")
    base_url = f"http://127.0.0.1:{port}"
    with process_group(command, log=log, env=environment_of(server)) as process:
        deadline = time.monotonic() + server.start_s
        while not _healthy(base_url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerFailed(log)
            time.sleep(0.25)
        yield Running(base_url, process, command, log)


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            fix = f"end what listens there or give another port ({error.strerror})"
            raise AttnEditError("server.port", port, fix) from error


def _healthy(base_url: str) -> bool:
    try:
        return httpx.get(base_url + "/health", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
