"""What a run came to: kept apart from its checkpoints, so that a report needs no more than this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.trace import TRAINING, read_trace_events, shares
from benchmarks.training.layout import Layout
from training.config import Config
from training.files import read_json, write_json
from training.loop import total_steps
from training.models import student_config
from training.options import flatten
from training.progress import SPEED, read_metrics
from training.resuming import check_continuation, find_checkpoints, read_state
from training.tracing import TRACE
from vllm_attnedit.accounting import kv_bytes_per_token
from vllm_attnedit.config import SLIDING
from vllm_attnedit.errors import AttnEditError

POINTS = 300
"""Of a loss curve that is kept."""
_FIRST, _LAST = 5, 20
"""Steps that a first and a last value are the mean of."""
_KEPT = ("loss", "kl", "agreement", "cosine")


def read_result(layout: Layout, run: str) -> dict[str, Any]:
    """What is known of a run; empty before it began."""
    path = layout.result(run)
    found: dict[str, Any] = read_json(path, "result") if path.is_file() else {}
    return found


def stage_of(result: dict[str, Any], stage: str) -> dict[str, Any]:
    """What is known of a stage; empty before it began."""
    found: dict[str, Any] = result.get("stages", {}).get(stage, {})
    return found


def check_same(result: dict[str, Any], origin: str, stage: str, config: Config) -> None:
    """Refuse to add to a run that began otherwise.

    Args:
        result: of the run so far.
        origin: what it starts from.
        stage: of the run.
        config: that the stage would have now.

    Raises:
        AttnEditError: naming the first option that differs.
    """
    if result and result["origin"] != origin:
        fix = f"the run began with {result['origin']}: set it back or give the run another name"
        raise AttnEditError("student or after", origin, fix)
    known = stage_of(result, stage)
    if known:
        state = {"stage": stage, "data_hash": "", "config": known["config"]}
        check_continuation(state, config, stage, "")


def record(
    layout: Layout, run: str, stage: str, origin: str, config: Config, seconds: float
) -> None:
    """Add a part of a stage, which lasted ``seconds``, to what is known of its run."""
    folder = Path(config.output)
    rows = read_metrics(folder)
    if not rows:
        return
    result = read_result(layout, run) or {"run": run, "origin": origin, "stages": {}}
    known = stage_of(result, stage)
    result |= {"edit": describe(str(config.student))}
    finished = layout.model(run, stage).is_dir()
    step = total_steps(config) if finished else 0
    saved = find_checkpoints(folder / "checkpoints")
    about: dict[str, Any] = {}
    if saved:
        state = read_state(saved[-1])
        step = max(step, int(state["step"]))
        made = state["provenance"]
        about = {"data_hash": state["data_hash"], "device": made["device"]}
        about["commit"] = made["commit"]
    speeds = [*known.get("speeds", []), *_speed(folder)]
    tokens = config.optim.batch * config.data.sequence_length
    result["stages"][stage] = known | about | {
        "state": "finished" if finished else "stopped",
        "step": step,
        "steps": total_steps(config),
        "tokens": step * tokens,
        "seconds": known.get("seconds", 0.0) + seconds,
        "parts": known.get("parts", 0) + 1,
        "speeds": speeds,
        "first": means(rows[:_FIRST]) if rows[0]["step"] == 1 else known.get("first", {}),
        "last": means(rows[-_LAST:]),
        "curve": _curve(known.get("curve", []), rows),
        "shares": _shares(folder) or known.get("shares"),
        "config": flatten(config),
    }  # fmt: skip
    layout.result(run).parent.mkdir(parents=True, exist_ok=True)
    write_json(layout.result(run), result)


def describe(folder: str) -> dict[str, Any]:
    """Dims of an edited model, and its bytes of KV cache a token."""
    config = student_config(folder)
    edit, latent = config.edit, config.edit.kv_lora_rank is not None
    words = f"mla {edit.kv_lora_rank}+{edit.qk_rope_head_dim}" if latent else "gateswa"
    if config.sliding_window is not None:
        full = [i for i, kind in enumerate(edit.layer_types) if kind != SLIDING]
        words += f" W{config.sliding_window} full {','.join(map(str, full))}"
    words += f" {config.provenance.get('init', '')}".rstrip()
    gate = edit.gate or "none"
    if gate != ("none" if latent else "headwise"):
        words += f" gate {gate}"
    return {"words": words, "kv_bytes_per_token": kv_bytes_per_token(config)}


def speed(stage: dict[str, Any]) -> tuple[float | None, float | None]:
    """Tokens a second and share of the bf16 peak over all parts, start and compiler left out."""
    parts = stage.get("speeds", [])
    seconds = sum(part["seconds"] for part in parts)
    if not seconds:
        return None, None
    mfu = None
    if all(part["peak_flops"] for part in parts):
        spent = sum(part["peak_flops"] * part["seconds"] for part in parts)
        mfu = sum(part["flops"] for part in parts) / spent
    return sum(part["tokens"] for part in parts) / seconds, mfu


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over steps, of what they report."""
    names = [name for name in _KEPT if rows and name in rows[0]]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def _curve(known: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over neighbouring steps; what is not in ``rows`` any more stays as it was known."""
    group = -(-len(rows) // POINTS)
    points = [rows[i : i + group] for i in range(0, len(rows), group)]
    before = [point for point in known if point["tokens"] < rows[0]["tokens"]]
    return before + [{"tokens": part[-1]["tokens"], **means(part)} for part in points]


def _shares(folder: Path) -> dict[str, float] | None:
    """Where the time of the traced steps went, if some were traced (``log.profile``)."""
    if not (folder / TRACE).is_file():
        return None
    try:
        return shares(read_trace_events(folder / TRACE), TRAINING)
    except AttnEditError:  # it was stopped before the first traced step was over
        return None


def _speed(folder: Path) -> list[dict[str, Any]]:
    """What the last part left of its speed; it is counted once."""
    path = folder / SPEED
    if not path.is_file():
        return []
    found: dict[str, Any] = read_json(path, "speed")
    path.unlink()
    return [{key: found.get(key) for key in ("tokens", "seconds", "flops", "peak_flops")}]
