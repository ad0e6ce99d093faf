"""Which layers stay full: the ones whose windows cost the teacher most on a calibration text.

Greedy forward selection. All layers start with windows; in every round each remaining layer is made
full on trial, and the one that lowers the mean loss most stays. The unedited teacher is never far
away: no weight changes, only masks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training import attention
from training.attention import build_masks
from training.config import Config
from training.data.batches import make_batch
from training.data.packing import Sequence
from training.models import Trunk, load_teacher, load_tokenizer
from training.parallel import Devices
from training.progress import say
from vllm_attnedit.config import FULL, SLIDING, AttentionEdit
from vllm_attnedit.edit.patterns import GROUP
from vllm_attnedit.errors import AttnEditError


@dataclass(frozen=True)
class Choice:
    """Full layers, and what they cost.

    Attributes:
        layers: that stay full, in order.
        loss: mean loss in nats a token with them.
        full_loss: of the unedited teacher.
        history: (layer, loss) of each round.
    """

    layers: tuple[int, ...]
    loss: float
    full_loss: float
    history: tuple[tuple[int, float], ...]


def read_windows(
    path: str | None, field: str, tokenizer: object, length: int, limit: int | None
) -> Tensor:
    """The text of a file as token ids (windows, length); what is left over is dropped.

    Raises:
        AttnEditError: if it cannot be read or is shorter than one window.
    """
    if path is None:
        raise AttnEditError(field, "missing", "name a text file")
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise AttnEditError(field, path, f"give a readable text file ({error.strerror})") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[operator]
    count = min(len(ids) // length, limit or len(ids))
    if count == 0:
        fix = f"give a longer text: it has {len(ids):,} tokens and a window takes {length:,}"
        raise AttnEditError(field, path, fix)
    return torch.tensor(ids[: count * length]).view(count, length)


def window_edit(layers: int, full: tuple[int, ...], window: int) -> AttentionEdit:
    """Windows everywhere but in some layers, without a gate: needs no new tensor."""
    types = tuple(FULL if layer in full else SLIDING for layer in range(layers))
    return AttentionEdit(layer_types=types, sliding_window=window if SLIDING in types else None)


class Trial:
    """The loss of a teacher under any pattern of full and window layers.

    Args:
        teacher: frozen, on its device, with packed attention.
        ids: calibration windows (sequences, T).
        window: of the layers that are not full.
        form: of the masks.
        sinks: first tokens that windows show besides; needs ``sdpa`` masks.
    """

    def __init__(self, teacher: Trunk, ids: Tensor, window: int, form: str, sinks: int = 0) -> None:
        self._teacher, self._window, self._form, self._sinks = teacher, window, form, sinks
        rows = ids.numpy()
        length = rows.shape[1]
        documents, answers = (
            torch.zeros(length, dtype=torch.int32),
            torch.ones(length, dtype=torch.bool),
        )
        self._batches = [
            make_batch(
                [Sequence(row, documents.numpy(), answers.numpy())], (number,), answers_only=False
            )
            for number, row in enumerate(rows)
        ]

    @torch.no_grad()
    def loss(self, full: tuple[int, ...]) -> float:
        """Mean loss in nats a token when these layers are full and the others have windows."""
        layers = self._teacher.layers
        edit = window_edit(len(layers), full, self._window)
        self._teacher.lm.config.attention_edit = edit.to_dict()
        for layer, layer_type in zip(layers, edit.layer_types):
            attn: Any = layer.self_attn
            attn.sliding_window = self._window if layer_type == SLIDING else None
        device = self._teacher.head.device
        total, count = 0.0, 0
        for batch in self._batches:
            on_device = batch.to(device)
            masks = build_masks(on_device, self._form, self._window)
            if self._sinks:
                full_mask, window_mask = masks[FULL], masks[SLIDING]
                assert isinstance(full_mask, Tensor) and isinstance(window_mask, Tensor)
                first = torch.arange(full_mask.shape[-1], device=device) < self._sinks
                masks[SLIDING] = window_mask | (full_mask & first)
            hidden = self._teacher(on_device, masks)[0, :-1]
            targets = on_device.input_ids[0, 1:]
            for part, wanted in zip(hidden.split(1024), targets.split(1024)):
                logits = (part @ self._teacher.head.t()).float()
                total += functional.cross_entropy(logits, wanted, reduction="sum").item()
            count += len(targets)
        return total / count


def choose_full_layers(
    config: Config, count: int | None = None, window: int | None = None
) -> Choice:
    """Choose by the calibration text of ``config.choose``.

    Args:
        config: of the run.
        count: full layers; default: ``choose.count``, or one in six.
        window: of the others; default: ``choose.window``.

    Raises:
        AttnEditError: if there is no calibration text, or more layers are asked for than there are.
    """
    settings = config.choose
    devices = Devices(replace(config.run, sharding="none"), config.seed)
    ids = read_windows(
        settings.text,
        "choose.text",
        load_tokenizer(config.teacher),
        settings.sequence_length,
        settings.sequences,
    )
    form = attention.choose(config.run.attention, devices.device, config.run.precision)
    if settings.sinks:
        form = "sdpa"  # the only masks that can show a window and a beginning
    loaded = load_teacher(
        config.teacher, dtype=devices.compute_dtype, attention=attention.register()
    )
    teacher = Trunk(loaded.to(devices.device))
    layers = len(teacher.layers)
    wanted = count or settings.count or max(1, layers // GROUP)
    if wanted > layers:
        raise AttnEditError("choose.count", wanted, f"the teacher has {layers} layers")
    trial = Trial(teacher, ids, window or settings.window, form, settings.sinks)
    return select(trial, layers, wanted)


def select(trial: Trial, layers: int, count: int) -> Choice:
    """Greedy forward selection of ``count`` layers out of ``layers``."""
    everything = trial.loss(tuple(range(layers)))
    kept: tuple[int, ...] = ()
    history: list[tuple[int, float]] = []
    for _ in range(count):
        losses = {layer: trial.loss((*kept, layer)) for layer in range(layers) if layer not in kept}
        best = min(losses, key=lambda layer: (losses[layer], layer))
        kept = tuple(sorted((*kept, best)))
        history.append((best, losses[best]))
        say(f"full layer {best}: calibration loss {losses[best]:.4f} (teacher {everything:.4f})")
    return Choice(kept, history[-1][1], everything, tuple(history))


def report_choice(config: Config) -> None:
    """Print the choice for people, then as one JSON line."""
    choice = choose_full_layers(config)
    listed = ",".join(map(str, choice.layers))
    say(f"attnedit edit {config.teacher} OUT --target gateswa --full-layers {listed}")
    say(
        json.dumps(
            {"full_layers": choice.layers, "loss": choice.loss, "teacher_loss": choice.full_loss}
        )
    )
