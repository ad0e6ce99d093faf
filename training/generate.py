"""Text that the teacher writes itself, sampled from short beginnings: training without a corpus.

vLLM runs in a process of its own, through its public API: this package never imports it, and the
engine's memory is free again when the process ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from training.config import Config
from training.data.packing import shuffled
from training.files import disk_errors
from training.models import load_tokenizer
from training.progress import say
from vllm_attnedit.errors import AttnEditError

_GRACE_S = 20.0
"""What vLLM gets to end by itself."""


def texts_path(config: Config) -> Path:
    """Where the texts go."""
    return Path(config.generate.path or Path(config.output) / "teacher.jsonl")


def beginnings(config: Config, tokenizer: Any) -> list[list[int]]:
    """The token ids each text begins with.

    From the lines of ``generate.seeds``, in turn; or drawn from the vocabulary, special tokens left
    out, so that samples cover whatever the teacher can be led to.

    Raises:
        AttnEditError: if the file cannot be read or holds nothing.
    """
    settings = config.generate
    start: list[int] = list(tokenizer("")["input_ids"])
    if settings.seeds is not None:
        try:
            lines = Path(settings.seeds).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            fix = f"give a readable text file ({error.strerror})"
            raise AttnEditError("generate.seeds", settings.seeds, fix) from error
        lines = [line for line in lines if line.strip()]
        if not lines:
            raise AttnEditError(
                "generate.seeds", settings.seeds, "give a file with one text a line"
            )
        encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
        return [start + encoded[i % len(encoded)] for i in range(settings.samples)]
    special = set(tokenizer.all_special_ids)
    plain = np.array([i for i in range(len(tokenizer)) if i not in special])
    found = []
    for number in range(settings.samples):
        drawn = plain[shuffled(len(plain), config.seed, number)[: settings.seed_tokens]]
        found.append(start + drawn.tolist())
    return found


def written(path: Path) -> int:
    """Texts that are on disk already; a line that was cut off is dropped."""
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if len(whole) != len(lines):
        path.write_bytes(b"".join(whole))
    return len(whole)


def write_texts(config: Config) -> Path:
    """Have the teacher write until there are ``generate.samples`` texts; returns their file.

    Raises:
        AttnEditError: if vLLM is missing, or fails.
    """
    path = texts_path(config)
    if find_spec("vllm") is None:
        raise AttnEditError(
            "generate", "vLLM is not installed", "install vllm, which samples the texts"
        )
    tokenizer = load_tokenizer(config.teacher)
    prompts = beginnings(config, tokenizer)
    with _locked(path) as lock:
        done = written(path)
        if done >= len(prompts):
            say(f"{path}: {done:,} texts are there already")
            return path
        _run_sampler(_request(config, tokenizer, prompts, done, path), lock)
    say(f"{path}: {written(path):,} texts")
    return path


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Opens the texts' file for one writer, the sampler included: it inherits the descriptor, and
    may outlive this process.

    Raises:
        AttnEditError: if another one has it.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            fix = "wait for the other process that writes there, or end it"
            raise AttnEditError("generate.path", path, fix) from error
        yield file.fileno()


def _request(
    config: Config, tokenizer: Any, prompts: list[list[int]], done: int, path: Path
) -> dict[str, Any]:
    """What the sampler is to do; the first ``done`` texts are there."""
    settings = config.generate
    return {
        "model": str(Path(config.teacher).resolve())
        if Path(config.teacher).exists()
        else config.teacher,
        "engine": {"seed": config.seed, **settings.vllm},
        "sampling": {
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        },
        "prompts": prompts[done:],
        "texts": [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts[done:]],
        "seeds": [config.seed * 1_000_003 + number for number in range(done, len(prompts))],
        "batch": settings.batch,
        "out": str(path.resolve()),
    }


def _run_sampler(request: dict[str, Any], lock: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "training.sampler", str(file)]
        root = Path(__file__).resolve().parents[1]
        code = _run_in_a_group(command, root, lock)
    if code:
        fix = "see vLLM's message above; generate.vllm passes arguments such as max_model_len to it"
        raise AttnEditError("generate", f"vLLM ended with status {code}", fix)


def _run_in_a_group(command: list[str], folder: Path, lock: int) -> int:
    """Run a command that starts processes of its own; none outlives this call, even if a signal
    ends it."""

    def stop(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        process = subprocess.Popen(command, cwd=folder, pass_fds=(lock,), start_new_session=True)
        try:
            return process.wait()
        finally:
            for number in before:
                signal.signal(number, signal.SIG_IGN)
            for ending in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, ending)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
