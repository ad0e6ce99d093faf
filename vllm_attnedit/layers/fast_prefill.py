"""Whether prompts skip the layers above the last full one, and how much of them.

Those layers look back a window each: U of them at most U x (W - 1) tokens. So of a prompt's chunk
they need the last tokens alone: to say what comes next, and to leave the keys and values that the
next chunk, the next decodes and prefix hits can see. All others stop below them. The values of what
is needed do not change; hidden states of tokens that stopped do not exist.
"""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_attnedit.config import SLIDING, AttnEditConfig
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.layers.window import stock_reason

logger = init_logger(__name__)

OPTION = "attnedit_fast_prefill"
"""Key of vLLM's ``--additional-config``: ``true`` or ``false`` (default)."""

MARGIN = 256
"""Tokens beyond the window before a chunk's end whose keys and values all layers have. Prefix hits
end at multiples of the largest block, somewhat before the chunk does."""


def layers_above(config: AttnEditConfig) -> int:
    """U, the window layers above the last full one."""
    above = 0
    for layer_type in reversed(config.edit.layer_types):
        if layer_type != SLIDING:
            break
        above += 1
    return above


def reason_against(vllm_config: VllmConfig) -> str | None:
    """Why every token has to pass every layer here; ``None`` if not."""
    config: AttnEditConfig = vllm_config.model_config.hf_text_config
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    above = layers_above(config)
    if above == 0:
        return "the last layer is no window layer"
    if above == config.num_hidden_layers:
        return "no layer is full"
    if (stock := stock_reason(vllm_config)) is not None:
        return stock
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        return f"not on {current_platform.device_type}"
    if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1:
        return "pipeline and data parallelism count on as many tokens in every layer"
    if vllm_config.lora_config is not None:
        return "LoRA adapters are chosen by a token's place in the step"
    if speculative is not None and speculative.method not in ("ngram", "ngram_gpu", "suffix"):
        return f"{speculative.method} drafts from the hidden states of prompts"
    if vllm_config.model_config.runner_type != "generate":
        return "pooling reads all tokens"
    return None


def fast_prefill(vllm_config: VllmConfig) -> bool:
    """Whether prompts skip layers; asked for and not possible is one log line.

    Raises:
        AttnEditError: for an option that is neither true nor false.
    """
    asked = (vllm_config.additional_config or {}).get(OPTION, False)
    if not isinstance(asked, bool):
        raise AttnEditError(f"--additional-config {OPTION}", asked, "use true or false")
    if not asked:
        return False
    reason = reason_against(vllm_config)
    if reason is not None:
        logger.warning_once("Prompts pass through all layers: %s.", reason)
    return reason is None


def tokens_that_pass(layers: int, sliding_window: int, page_size: int) -> int:
    """The last tokens of a chunk that enter the lowest of U window layers.

    The lowest one spoils W - 1 of them, which saw less than their window, the next one as many
    more. What the highest one then reads for its keys and values are those of
    :func:`tokens_stored`.
    """
    return layers * (sliding_window - 1) + max(MARGIN, page_size)


def tokens_stored(sliding_window: int) -> int:
    """The last tokens of a chunk whose keys and values every window layer has."""
    return sliding_window - 1 + MARGIN
