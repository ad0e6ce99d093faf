"""What may change between two parts of a run, and what may not."""

from __future__ import annotations

from typing import Any

from training.config import Config
from training.options import flatten
from vllm_attnedit.errors import AttnEditError

# Where things are and how they are computed may change between two parts of a run; what is computed
# may not. The data itself is compared by its hash.
FREE = (
    "teacher", "student", "output", "data.sources", "data.shards", "run.device", "run.attention",
    "run.compile", "run.gradient_checkpointing", "run.sharding", "run.minutes", "run.deterministic",
    "optim.micro_batch", "stage2.chunk_tokens", "stage2.cache", "stage1.split",
    "checkpoint.", "log.", "generate.", "evaluate.", "choose.",
)  # fmt: skip
_OF_STAGE = {"stage1": "stage2.", "stage2": "stage1."}


def check_continuation(state: dict[str, Any], config: Config, stage: str, data_hash: str) -> None:
    """Refuse to go on from a checkpoint under another configuration or with other data.

    Args:
        state: what the checkpoint says of itself.
        config: of the run that would go on.
        stage: ``stage1`` or ``stage2``.
        data_hash: of its shards.

    Raises:
        AttnEditError: naming the first option that differs, with the value to set it back to.
    """
    if state["stage"] != stage:
        fix = "name another output folder: a stage starts from an edited model, not a checkpoint"
        raise AttnEditError("output", f"holds checkpoints of {state['stage']}", fix)
    if state["data_hash"] != data_hash:
        fix = "resume with the data that the run began with, or name another output folder"
        raise AttnEditError("data", f"hash {data_hash[:12]}", fix)
    before = state["config"]
    for name, value in flatten(config).items():
        if name.startswith((*FREE, _OF_STAGE[stage])) or before.get(name, value) == value:
            continue
        fix = f"the run began with {before[name]}: set it back or name another output folder"
        raise AttnEditError(name, value, fix)
