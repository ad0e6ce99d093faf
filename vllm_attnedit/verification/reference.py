"""Greedy generation by the reference model, with log-probabilities."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from vllm_attnedit.verification.comparison import Reference

_TOP = 5


def generate_reference(
    checkpoint: str | Path,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    dtype: str = "float32",
    device: str | None = None,
) -> list[Reference]:
    """Continue each prompt greedily with the reference (or, of a plain teacher, its own) model.

    One prompt at a time, with the model's cache, beyond end-of-sequence tokens. The model is
    released before this returns.

    Args:
        checkpoint: folder of an edited checkpoint or a teacher.
        prompts: token ids, at least one each.
        tokens: to generate for each.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: of torch; by default a CUDA device if there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    model = model.to(device).eval()
    # The checkpoint's own would add sampling, penalties and end-of-sequence tokens.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    try:
        return [_generate(model, prompt, device) for prompt in prompts]
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@torch.inference_mode()
def _generate(model: torch.nn.Module, prompt: Sequence[int], device: str) -> Reference:
    ids = torch.tensor([list(prompt)], device=device)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
    logprobs = torch.stack(generated.logits)[:, 0].float().log_softmax(-1).cpu()  # (T, vocabulary)
    new = generated.sequences[0, len(prompt) :].cpu()
    values, indices = logprobs.topk(min(_TOP, logprobs.shape[-1]))
    return Reference(
        prompt=list(prompt),
        tokens=new.tolist(),
        logprobs=logprobs.gather(1, new[:, None])[:, 0].tolist(),
        top=[
            dict(zip(i, v, strict=True))
            for i, v in zip(indices.tolist(), values.tolist(), strict=True)
        ],
    )
