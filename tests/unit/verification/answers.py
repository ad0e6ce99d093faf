"""A reference's answer, and one of vLLM's that agrees with it."""

from __future__ import annotations

from vllm_attnedit.verification import Answer, Reference

REFERENCE = Reference(
    prompt=[1, 2, 3],
    tokens=[10, 11, 12],
    logprobs=[-0.5, -0.7, -0.9],
    top=[{10: -0.5, 20: -2.0}, {11: -0.7, 21: -0.7004}, {12: -0.9, 22: -0.95}],
)


AGREEING = Answer(
    tokens=[10, 11, 12],
    logprobs=[-0.5, -0.7, -0.9],
    read_logprobs=[-0.5, -0.7, -0.9],
    read_greedy=[10, 11, 12],
)
