"""Samples texts with vLLM's public API: a program of its own, started by ``generate``.

Reads a request (JSON) from the file named on the command line, appends JSON lines to the file that
the request names, a batch at a time. What is written survives; the rest can be asked for again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def sample(request: dict[str, Any]) -> None:
    """Continue every prompt of a request.

    Args:
        request: ``model``, ``engine`` (arguments of ``vllm.LLM``), ``sampling`` (of
            ``vllm.SamplingParams``), ``prompts`` (token ids), ``seeds`` (one a prompt), ``batch``,
            ``out``.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(model=request["model"], **request["engine"])
    prompts, seeds = request["prompts"], request["seeds"]
    with Path(request["out"]).open("a", encoding="utf-8") as out:
        for start in range(0, len(prompts), request["batch"]):
            part = slice(start, start + request["batch"])
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts[part]],
                [SamplingParams(seed=seed, **request["sampling"]) for seed in seeds[part]],
                use_tqdm=False,
            )
            for seed, beginning, output in zip(seeds[part], request["texts"][part], outputs):
                text = beginning + output.outputs[0].text
                out.write(json.dumps({"text": text, "seed": seed}) + "\n")
            out.flush()
            print(f"{start + len(outputs):,} of {len(prompts):,} texts", flush=True)


if __name__ == "__main__":
    sample(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
