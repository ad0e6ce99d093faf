"""Where a run goes on, and what may change between two parts of it and what may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.config import Config
from training.files import read_json
from training.options import flatten
from training.parts import check_indexes
from vllm_attnedit.errors import AttnEditError

STATE = "state.json"
"""In a checkpoint: what it says of itself."""

# Where things are and how they are computed may change between two parts of a run; what is computed
# may not. Data and teacher are compared by what they hold, the student by its edit.
FREE = (
    "teacher", "student", "output", "data.sources", "data.shards", "run.device", "run.attention",
    "run.compile", "run.gradient_checkpointing", "run.sharding", "run.shard_frozen", "run.minutes",
    "run.deterministic", "optim.micro_batch", "stage2.chunk_tokens", "stage2.cache", "stage1.split",
    "checkpoint.", "log.", "generate.", "evaluate.", "choose.",
)  # fmt: skip
_OF_STAGE = {"stage1": "stage2.", "stage2": "stage1."}


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        AttnEditError: if it is no checkpoint.
    """
    state = read_json(path / STATE, "checkpoint.resume")
    if not isinstance(state, dict) or "step" not in state:
        raise AttnEditError("checkpoint.resume", path, "give the folder of a checkpoint (step-...)")
    return state


def read_whole(path: Path) -> dict[str, Any]:
    """The same of a checkpoint whose tensors are wanted.

    Raises:
        AttnEditError: also if a part of it was not copied along.
    """
    state = read_state(path)
    check_indexes(path, state.get("indexes", ()))  # older ones do not say which there are
    return state


def choose_checkpoint(folder: Path, requested: str) -> Path | None:
    """The checkpoint that a run goes on from.

    Args:
        folder: of the run's own checkpoints.
        requested: ``checkpoint.resume``: ``auto``, ``never`` or the folder of a checkpoint.

    Returns:
        ``None`` for a fresh start.

    Raises:
        AttnEditError: if there is no such checkpoint, or it is not the newest of this run.
    """
    own = find_checkpoints(folder)
    if requested == "never":
        if own:
            fix = "name another output folder, or set checkpoint.resume: auto"
            raise AttnEditError("output", f"{folder} holds checkpoints", fix)
        return None
    path = Path(requested)
    if path.resolve() in [older.resolve() for older in own[:-1]]:
        if read_state(own[-1])["config"].get("checkpoint.resume") == requested:
            return own[-1]  # the run went on from there, and does so again
        fix = f"remove the newer ones, {own[-1]} last, or name another output folder"
        raise AttnEditError("checkpoint.resume", requested, fix)
    if requested == "auto" or own:
        # Once a run that began elsewhere has saved, its own checkpoints are the newer ones.
        return own[-1] if own else None
    if not (path / STATE).is_file():
        fix = "give auto, never or the folder of a checkpoint (with its state.json)"
        raise AttnEditError("checkpoint.resume", requested, fix)
    return path


def check_continuation(
    state: dict[str, Any],
    config: Config,
    stage: str,
    data_hash: str,
    models: dict[str, Any] | None = None,
) -> None:
    """Refuse to go on from a checkpoint under another configuration or with other data.

    Args:
        state: what the checkpoint says of itself.
        config: of the run that would go on.
        stage: ``stage1`` or ``stage2``.
        data_hash: of its shards.
        models: what :func:`training.pairing.check_models` says of them, if that is known.

    Raises:
        AttnEditError: naming the first option that differs, with the value to set it back to.
    """
    if state["stage"] != stage:
        fix = "name another output folder: a stage starts from an edited model, not a checkpoint"
        raise AttnEditError("output", f"holds checkpoints of {state['stage']}", fix)
    if state["data_hash"] != data_hash:
        fix = "resume with the data that the run began with, or name another output folder"
        raise AttnEditError("data", f"hash {data_hash[:12]}", fix)
    _check_models(state.get("models", {}), models or {}, config)
    before = state["config"]
    for name, value in flatten(config).items():
        if name.startswith((*FREE, _OF_STAGE[stage])) or before.get(name, value) == value:
            continue
        fix = f"the run began with {before[name]}: set it back or name another output folder"
        raise AttnEditError(name, value, fix)


def _check_models(before: dict[str, Any], now: dict[str, Any], config: Config) -> None:
    for what in ("teacher", "teacher_weights"):
        if what in before and before[what] != now.get(what, before[what]):
            fix = "the run began with a teacher of other weights: go on with that one"
            raise AttnEditError("teacher", config.teacher, fix)
    edit, changed = before.get("edit"), now.get("edit")
    if not edit or not changed or edit == changed:
        return
    name = min(n for n in edit.keys() | changed.keys() if edit.get(n) != changed.get(n))
    fix = f"the run's student has {edit.get(name)}: go on with that one"
    raise AttnEditError(f"student {name}", changed.get(name), fix)
