"""One verification from end to end: prompts, reference, vLLM, verdicts.

The report is JSON-ready, and its fields are stable (new ones may be added)::

    ok                      whether every prompt agrees
    checkpoint, dtype, logprob_tolerance    as given
    sliding_window          keys a window layer sees, or null
    max_num_batched_tokens  the chunk in which vLLM read prompts
    prompts                 one object each: ok, and the fields of ``Verdict``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_attnedit.accounting import kv_bytes_per_request
from vllm_attnedit.checkpoint import load_config
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.verification.comparison import compare
from vllm_attnedit.verification.prompts import default_lengths, default_prompts, read_prompts
from vllm_attnedit.verification.served import EngineSettings, serve_offline

# float32 tells a right model from a wrong one: right ones agree to about 1e-5. In bfloat16 two
# right implementations round differently, and were seen to differ by up to 0.12.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
_CHUNKS = 3
_SMALLEST_CHUNK = 16
_LARGEST_BLOCK = 256

Encode = Callable[[str], list[int]]
Stage = Callable[[str], AbstractContextManager[object]]


def verify_checkpoint(
    checkpoint: str,
    *,
    prompts: Path | None = None,
    tokens: int = 64,
    dtype: str = "float32",
    logprob_tolerance: float | None = None,
    engine_args: Mapping[str, Any] | None = None,
    stage: Stage = lambda title: nullcontext(),
) -> dict[str, Any]:
    """Compare ``checkpoint`` in the reference and in vLLM; see the module for the result.

    Args:
        checkpoint: folder or hub id, of an edited model or a teacher.
        prompts: text file with a prompt a line; by default prose shorter than, as long as and
            several times longer than the window.
        tokens: to generate for each prompt.
        dtype: on both sides.
        logprob_tolerance: largest difference of log-probabilities that passes; by default that of
            ``TOLERANCES`` for the dtype.
        engine_args: any others of ``vllm.LLM``.
        stage: entered around each slow part, with its title.

    Raises:
        AttnEditError: for bad arguments or a checkpoint that cannot be read.
        ServingError: if vLLM fails.
    """
    if tokens < 1:
        raise AttnEditError("--tokens", tokens, "give an integer >= 1")
    if dtype not in TOLERANCES:
        raise AttnEditError("--dtype", dtype, f"use one of {', '.join(TOLERANCES)}")
    if logprob_tolerance is None:
        logprob_tolerance = TOLERANCES[dtype]
    if not 0 < logprob_tolerance < 1:
        fix = "give a number between 0 and 1"
        raise AttnEditError("--logprob-tolerance", logprob_tolerance, fix)
    if Path(checkpoint).is_file():
        raise AttnEditError("checkpoint", checkpoint, "give the folder of the checkpoint")
    config = load_config(checkpoint)
    if getattr(config, "quantization_config", None):
        fix = "give the unquantised checkpoint: the reference model reads no other"
        raise AttnEditError("quantization_config", checkpoint, fix)
    if Path(checkpoint).is_dir():
        SafetensorsStore(Path(checkpoint)).close()  # a file that was cut off is named here
    ids = _prompt_ids(checkpoint, config, prompts, config.max_position_embeddings - tokens - 1)

    with stage("generating with the reference model"):
        from vllm_attnedit.verification.reference import generate_reference

        references = generate_reference(checkpoint, ids, tokens=tokens, dtype=dtype)
    longest = max(len(prompt) for prompt in ids)
    chunk = max(_SMALLEST_CHUNK, -(-longest // _CHUNKS))
    held = kv_bytes_per_request(
        config, longest + tokens + 1, kv_dtype="fp32", block_size=_LARGEST_BLOCK
    )
    settings = EngineSettings(
        dtype=dtype,
        max_num_batched_tokens=chunk,
        max_num_seqs=len(ids),
        # Twice what the requests hold: the windows of a prompt being read take more for a while.
        kv_memory=max(2**30, 2 * held * len(ids)),
        engine_args=engine_args or {},
    )
    with stage("generating with vLLM"):
        answers = serve_offline(checkpoint, references, settings)
    verdicts = [
        compare(reference, answer, logprob_tolerance)
        for reference, answer in zip(references, answers, strict=True)
    ]
    return {
        "ok": all(verdict.ok for verdict in verdicts),
        "checkpoint": checkpoint,
        "dtype": dtype,
        "logprob_tolerance": logprob_tolerance,
        "sliding_window": getattr(config, "sliding_window", None),
        "max_num_batched_tokens": chunk,
        "prompts": [{"ok": verdict.ok, **asdict(verdict)} for verdict in verdicts],
    }


def _prompt_ids(checkpoint: str, config: Any, prompts: Path | None, limit: int) -> list[list[int]]:
    encode = _encoder(checkpoint)
    if prompts is None:
        window = getattr(config, "sliding_window", None)
        return default_prompts(default_lengths(window, limit), config.vocab_size, encode)
    if encode is None:
        raise AttnEditError("--prompts", prompts, "leave it out: the checkpoint has no tokenizer")
    return read_prompts(prompts, encode, limit)


def _encoder(checkpoint: str) -> Encode | None:
    from transformers import AutoTokenizer

    folder = Path(checkpoint)
    if folder.is_dir() and not any(folder.glob("*token*")):
        return None
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    return encode
