"""What the served engine says against the reference model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm import RequestOutput

from vllm_attnedit.hf import AttnEditForCausalLM


@torch.no_grad()
def gap(model: AttnEditForCausalLM, prompt: list[int], output: RequestOutput) -> float:
    """The worst difference to the reference's log-probabilities of the served tokens."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    tokens = list(completion.token_ids)
    served = [step[t].logprob for step, t in zip(completion.logprobs, tokens, strict=True)]
    ids = torch.tensor([prompt + tokens], device="cuda")
    logits = model.to("cuda")(ids).logits[0, len(prompt) - 1 : -1].float()
    chosen = torch.tensor(tokens, device="cuda")[:, None]
    expected = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return max(abs(a - b) for a, b in zip(served, expected, strict=True))


def check(
    model: AttnEditForCausalLM,
    prompts: Sequence[list[int]],
    outputs: Sequence[RequestOutput],
    tolerance: float = 5e-3,
) -> None:
    """Every served log-probability is the reference's, within the tolerance."""
    for prompt, output in zip(prompts, outputs, strict=True):
        assert gap(model, prompt, output) <= tolerance, len(prompt)
