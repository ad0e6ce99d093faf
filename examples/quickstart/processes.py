"""Child processes that never outlive this one: each in its own process group, ended as a whole.

vLLM's server starts an engine and workers; signalling only the process that was started can leave
them behind. A signal to this program becomes an exception, so that every ``with`` block on the way
out ends its group.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_SECONDS = 8.0
"""How long a group may take to end by itself after SIGTERM."""

# An exception's closing line, after the prefixes that vLLM writes: process, level, time and place.
_EXCEPTION = re.compile(r"(?:\(.*?\) )?(?:ERROR .*?\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)")

_PORTS = range(20_000, 32_000)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_deferring = False
_pending: int | None = None


def vllm_command() -> list[str]:
    """The ``vllm`` program of this Python, as a module.

    Its script need not lie beside the interpreter, nor name this one (``pip install --target``).
    """
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def free_port() -> int:
    """A port of the loopback address that nothing listens on, for a child to take.

    It lies below those that systems hand to outgoing connections (Linux from 32,768 on): one of
    these could be given away before the child binds it. Drawn at random, so that two programs that
    ask at the same moment hardly ever get the same.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {_PORTS.start} to {_PORTS.stop - 1}")


class CommandFailed(RuntimeError):
    """A command ended with a status other than 0; the text ends with what its log says of it."""

    def __init__(self, command: Sequence[str], status: int, log: Path | None) -> None:
        shown = f"`{' '.join(command)}` ended with status {status}"
        if log is not None:
            shown += f"; {log} says:\n{errors_or_end(log)}"
        super().__init__(shown)


def stop_on_signals() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into ``SystemExit(128 + signal)``, once."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _pending
    if _deferring:
        _pending = _pending or number
        return
    # A second Ctrl-C must not interrupt the clean-up that the first one started.
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Hold a signal back until the end of the block."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
    if _pending is not None:
        _on_signal(_pending, None)


@contextmanager
def process_group(
    command: Sequence[str], *, log: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``command`` in its own process group; nothing of it is left when the block ends.

    Args:
        command: program and arguments.
        log: file that stdout and stderr go to, begun anew; ``None`` shares this program's.
        env: variables on top of this program's.
    """
    process: subprocess.Popen[bytes] | None = None
    try:
        with _signals_deferred():
            process = _start(command, log, env)
        yield process
    finally:
        with _signals_deferred():
            if process is not None:
                _end_group(process)


def run(
    command: Sequence[str], *, log: Path | None = None, env: Mapping[str, str] | None = None
) -> None:
    """Run ``command`` to its end.

    Raises:
        CommandFailed: if its status is not 0.
    """
    with process_group(command, log=log, env=env) as process:
        status = process.wait()
    if status != 0:
        raise CommandFailed(command, status, log)


def errors_or_end(log: Path, count: int = 20) -> str:
    """The exceptions in a log, first one first, each once; without any, its last lines.

    A server of several processes ends with what the last one made of the failure; the cause stands
    far above, where the first one failed.
    """
    lines = log.read_text(errors="replace").splitlines()
    errors = dict.fromkeys(match[1] for line in lines if (match := _EXCEPTION.match(line)))
    return "\n".join(list(errors)[:count] or lines[-count:])


def _start(
    command: Sequence[str], log: Path | None, env: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **(env or {})}
    if log is None:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience
        while _group_exists(process) and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()


def _group_exists(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reaps the leader, whose zombie would count as a member
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
