"""vLLM's side: an offline engine in a process of its own, which takes its memory along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_attnedit.verification.comparison import Answer, Reference

_WORKER = Path(__file__).with_name("worker.py")
_LOG_LINES = 15
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process to end
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # the engine runs eagerly: compiling would only cost time
    "PYTHONSAFEPATH": "1",  # what stands beside the worker is not for vLLM to import
}


class ServingError(RuntimeError):
    """vLLM did not answer. The last lines of its log follow the first line."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How vLLM runs the checkpoint.

    Attributes:
        dtype: of weights and activations.
        max_num_batched_tokens: tokens a step: longer prompts are read in chunks of so many.
        max_num_seqs: requests in a batch.
        kv_memory: bytes for the KV cache; on CPU rounded up to whole GiB.
        engine_args: any others of ``vllm.LLM``; they win over what is set here.
        environ: environment variables on top of this process's.
        timeout: seconds for everything.
    """

    dtype: str = "float32"
    max_num_batched_tokens: int = 64
    max_num_seqs: int = 8
    kv_memory: int = 2**30
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 1800.0


def serve_offline(
    checkpoint: str | Path, references: Sequence[Reference], settings: EngineSettings
) -> list[Answer]:
    """Let vLLM continue and read each reference's text, all in one batch.

    The installed plugin has to make vLLM know the checkpoint; nothing is registered here.

    Raises:
        ServingError: if vLLM fails or does not end in time.
    """
    longest = max(len(r.prompt) + len(r.tokens) for r in references)
    engine = {
        "model": str(checkpoint),
        "dtype": settings.dtype,
        "max_model_len": longest + 1,  # after reading, vLLM has to generate one token
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_num_seqs": min(settings.max_num_seqs, settings.max_num_batched_tokens),
        "kv_cache_memory_bytes": settings.kv_memory,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "seed": 0,
        **settings.engine_args,
    }
    jobs = [{"prompt": list(r.prompt), "tokens": list(r.tokens)} for r in references]
    with tempfile.TemporaryDirectory(prefix="attnedit-verify-") as folder:
        request, answer, log = (Path(folder, n) for n in ("request.json", "answer.json", "log"))
        request.write_text(json.dumps({"engine": engine, "jobs": jobs}))
        code = _run_worker([str(request), str(answer)], log, settings)
        if code != 0 or not answer.is_file():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            why = f"did not end within {settings.timeout:g} seconds" if code is None else "failed"
            raise ServingError(f"vLLM {why}; its last lines:\n{tail}")
        return [Answer(**item) for item in json.loads(answer.read_text())]


def _run_worker(arguments: list[str], log: Path, settings: EngineSettings) -> int | None:
    """Exit status of the worker, or ``None`` if it was ended for its time."""
    gib = -(-settings.kv_memory // 2**30)
    environ = {
        **os.environ,
        **_ENVIRONMENT,
        "VLLM_CPU_KVCACHE_SPACE": str(gib),
        **settings.environ,
    }
    with log.open("wb") as output:
        # A group of its own, so that whatever vLLM starts ends with it.
        process = subprocess.Popen(
            [sys.executable, str(_WORKER), *arguments],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(settings.timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
