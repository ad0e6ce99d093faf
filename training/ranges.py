"""Which values an option may take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_attnedit.errors import AttnEditError

# Names of options; an element of a list goes by the name of the list.
_POSITIVE = {
    "data.sources.max_tokens", "run.minutes", "optim.tokens", "optim.batch", "optim.micro_batch",
    "optim.eps", "stage1.lr", "stage2.lr", "stage2.chunk_tokens", "stage2.top_k",
    "checkpoint.keep", "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.parts_mb",
    "log.every", "log.peak_tflops", "log.profile", "generate.samples", "generate.seed_tokens",
    "generate.max_tokens", "generate.batch", "evaluate.batch", "evaluate.limit",
    "evaluate.max_windows", "evaluate.passkey.lengths", "evaluate.passkey.trials", "choose.count",
    "choose.window", "choose.sequences",
}  # fmt: skip
# A sequence of one token has no next token to predict.
_AT_LEAST_TWO = {
    "data.sequence_length", "evaluate.lengths", "evaluate.agreement_length",
    "choose.sequence_length",
}  # fmt: skip
_SHARES = {
    "optim.warmup", "optim.min_lr_ratio", "generate.top_p", "evaluate.passkey.depths",
}  # fmt: skip
_BELOW_ONE = {"optim.beta1", "optim.beta2"}
_NOT_NEGATIVE = {
    "optim.weight_decay", "optim.clip", "stage2.cosine_weight", "stage2.lr_rest",
    "evaluate.sinks", "evaluate.fewshot", "generate.temperature", "choose.sinks", "seed",
}  # fmt: skip


def check_ranges(options: Mapping[str, Any]) -> None:
    """Refuse values that make no sense.

    Args:
        options: by dotted name, as :func:`training.options.flatten` returns them.

    Raises:
        AttnEditError: naming the first such option.
    """
    for name, value in options.items():
        for kind, full, part in _parts(name, value):
            if part is not None:
                _check(kind, full, part)


def _parts(name: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    """(name in the tables above, name for people, value) of an option or of its elements."""
    if not isinstance(value, list):
        yield name, name, value
        return
    for place, part in enumerate(value):
        if isinstance(part, dict):
            for key, inner in part.items():
                yield f"{name}.{key}", f"{name}.{place}.{key}", inner
        else:
            yield name, f"{name}.{place}", part


def _check(kind: str, name: str, value: Any) -> None:
    if kind in _POSITIVE and value <= 0:
        raise AttnEditError(name, value, "give a number above 0")
    if kind in _AT_LEAST_TWO and value < 2:
        raise AttnEditError(name, value, "give at least 2")
    if kind in _SHARES and not 0 <= value <= 1:
        raise AttnEditError(name, value, "give a share between 0 and 1")
    if kind in _BELOW_ONE and not 0 <= value < 1:
        raise AttnEditError(name, value, "give a number from 0 to below 1")
    if kind in _NOT_NEGATIVE and value < 0:
        raise AttnEditError(name, value, "give 0 or more")
    if kind == "seed" and value >= 1 << 32:
        raise AttnEditError(name, value, f"give at most {(1 << 32) - 1}")
