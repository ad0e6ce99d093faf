"""Runs vLLM offline on the jobs of a JSON file: ``worker.py REQUEST ANSWER``.

A script, run by path: it knows vLLM's public API only, and vLLM finds the plugin by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(request_file: str, answer_file: str) -> None:
    """Answer ``request_file``."""
    from vllm import LLM, SamplingParams

    request = json.loads(Path(request_file).read_text())
    jobs = request["jobs"]
    llm = LLM(**request["engine"])
    steps = len(jobs[0]["tokens"])
    greedy = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    decoded = llm.generate(
        [{"prompt_token_ids": job["prompt"]} for job in jobs],
        SamplingParams(max_tokens=steps, logprobs=1, **greedy),
        use_tqdm=False,
    )
    read = llm.generate(
        [{"prompt_token_ids": job["prompt"] + job["tokens"]} for job in jobs],
        SamplingParams(max_tokens=1, prompt_logprobs=1, **greedy),
        use_tqdm=False,
    )
    answers = [_answer(*item) for item in zip(jobs, decoded, read, strict=True)]
    Path(answer_file).write_text(json.dumps(answers))


def _answer(job: dict[str, Any], decoded: Any, read: Any) -> dict[str, Any]:
    own = decoded.outputs[0]
    own_tokens = list(own.token_ids)
    read_steps = read.prompt_logprobs[len(job["prompt"]) :]
    return {
        "tokens": own_tokens,
        "logprobs": [
            step[token].logprob for step, token in zip(own.logprobs, own_tokens, strict=True)
        ],
        "read_logprobs": [
            step[token].logprob for step, token in zip(read_steps, job["tokens"], strict=True)
        ],
        "read_greedy": [min(step, key=lambda token: step[token].rank) for step in read_steps],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
