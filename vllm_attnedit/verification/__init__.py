"""Holds a served checkpoint to the reference model: tokens and log-probabilities.

    from vllm_attnedit.verification.reference import generate_reference

    references = generate_reference(checkpoint, prompts, tokens=64, dtype="float32")
    answers = serve_offline(checkpoint, references, EngineSettings(dtype="float32"))
    verdicts = [compare(r, a, tolerance=1e-3) for r, a in zip(references, answers)]

Importing this package imports neither torch nor vLLM.
"""

from vllm_attnedit.verification.comparison import Answer, Reference, Verdict, compare
from vllm_attnedit.verification.prompts import default_lengths, default_prompts
from vllm_attnedit.verification.served import EngineSettings, ServingError, serve_offline

__all__ = [
    "Answer",
    "EngineSettings",
    "Reference",
    "ServingError",
    "Verdict",
    "compare",
    "default_lengths",
    "default_prompts",
    "serve_offline",
]
