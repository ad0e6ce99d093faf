"""The real engine on tiny checkpoints, and the comparison with the reference model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from vllm_attnedit.hf import AttnEditForCausalLM

BLOCK_SIZE = 16
STEPS = 64
LOGPROB_TOLERANCE = 1e-3


@contextmanager
def engine(checkpoint: Path, **overrides: Any) -> Iterator[LLM]:
    """An in-process float32 engine that is gone afterwards."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": BLOCK_SIZE,
        "disable_log_stats": False,
        "seed": 0,
    }
    if torch.cuda.is_available():  # a small share: several tests may use one GPU at once
        settings |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}
    llm = None
    try:
        llm = LLM(model=str(checkpoint), **(settings | overrides))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
        torch.set_default_dtype(torch.float32)  # a start that failed leaves its own
        # Also after a failed start: it leaves the process groups behind.
        cleanup_dist_env_and_memory()


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 500, (n,), generator=generator).tolist() for n in lengths]


def greedy(steps: int = STEPS) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=steps, logprobs=1, ignore_eos=True)


def generate(llm: LLM, prompts: list[list[int]], steps: int = STEPS) -> list[RequestOutput]:
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, greedy(steps), use_tqdm=False)


@dataclass
class Expected:
    """The reference's greedy continuation and its log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


@torch.no_grad()
def reference(model: AttnEditForCausalLM, prompt: list[int], steps: int = STEPS) -> Expected:
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens = output[0, len(prompt) :]
    logits = model(output).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return Expected(tokens.tolist(), logprobs.tolist())


def assert_equal(output: RequestOutput, expected: Expected) -> None:
    """Tokens equal, log-probabilities of each within the tolerance."""
    completion = output.outputs[0]
    assert list(completion.token_ids) == expected.tokens
    assert completion.logprobs is not None
    served = [step[token].logprob for step, token in zip(completion.logprobs, expected.tokens)]
    worst = max(abs(a - b) for a, b in zip(served, expected.logprobs, strict=True))
    assert worst <= LOGPROB_TOLERANCE


def metric(llm: LLM, name: str) -> float:
    """The value of one of vLLM's counters, by its Prometheus name."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)
