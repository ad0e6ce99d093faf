"""What the student learns from in Stage 2: the teacher's next-token distributions.

Online, from the teacher's hidden states and head; or its top-k, which can be kept on disk, one
small file per sequence, so that a second run on the same data needs no teacher pass at all.

Shapes: B sequences, T tokens, N loss positions, J kept tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.data.batches import Batch
from training.files import digest, disk_errors, read_json, write_json
from training.kl import Dense, Target, TopK, top_k
from training.models import Trunk
from vllm_attnedit.errors import AttnEditError


class LayerStates:
    """Records the hidden states (B, T, E) after every layer of a model, in order."""

    def __init__(self, model: Trunk) -> None:
        self.states: list[Tensor] = []
        for layer in model.layers:
            layer.register_forward_hook(self._record)

    def _record(self, _module: Any, _args: Any, output: Any) -> None:
        self.states.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[Tensor]:
        """The states since the last call; forgets them."""
        states, self.states = self.states, []
        return states


class TeacherTargets:
    """Runs the teacher on a batch, or finds what it said before.

    Args:
        teacher: frozen, on the device.
        k: tokens kept of each distribution; ``None`` for all.
        chunk: positions whose logits exist at once.
        fp32_logits: form logits in float32.
        states: record hidden states for the cosine term.
        cache: where top-k distributions are kept.
        anywhere: whether something holds on any process that shares the teacher: a sharded one
            runs on all of them or on none.
    """

    def __init__(
        self,
        teacher: Trunk,
        *,
        k: int | None,
        chunk: int,
        fp32_logits: bool,
        states: bool,
        cache: TopKCache | None = None,
        anywhere: Callable[[bool], bool] = bool,
    ) -> None:
        self._teacher, self._k, self._chunk, self._fp32 = teacher, k, chunk, fp32_logits
        self._anywhere = anywhere
        self._states = LayerStates(teacher) if states else None
        self._cache = cache

    @torch.no_grad()
    def __call__(self, batch: Batch, masks: dict[str, Any]) -> tuple[Target, list[Tensor]]:
        """The target at the loss positions of a batch, and the hidden states, if recorded."""
        if self._cache is not None and self._states is None:
            found = self._cache.read(batch)
            missing = self._anywhere(found is None)
            if found is not None and not missing:
                return TopK(batch.pick(found.logp), batch.pick(found.ids)), []
        hidden = self._teacher(batch, masks).flatten(0, 1)  # (B T, E)
        states = self._states.take() if self._states else []
        head = self._teacher.head
        if self._k is None:
            return Dense(batch.pick(hidden), head), states
        if self._cache is None:
            return self._top_k(batch.pick(hidden), head), states
        whole = self._top_k(hidden, head)
        self._cache.write(batch, whole)
        return TopK(batch.pick(whole.logp), batch.pick(whole.ids)), states

    def _top_k(self, hidden: Tensor, head: Tensor) -> TopK:
        assert self._k is not None
        parts = [top_k(part, head, self._k, self._fp32) for part in hidden.split(self._chunk)]
        # Kept at half the size: 11 bits of a log probability are far more than training needs.
        logp = torch.cat([part.logp for part in parts]).to(torch.float16)
        return TopK(logp, torch.cat([part.ids for part in parts]))


class TopKCache:
    """Top-k distributions on disk, one file per sequence of the run's order.

    Args:
        folder: of the files.
        identity: what they depend on (teacher, data, order, length, k).

    Raises:
        AttnEditError: if the folder was filled by another teacher, data or setting.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        about = folder / "cache.json"
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not about.is_file():
                write_json(about, {"identity": digest(identity), **identity})
        found = read_json(about, "stage2.cache")
        if found.get("identity") != digest(identity):
            known = {name: found[name] for name in identity if name in found}
            changed = [name for name, value in known.items() if value != identity[name]]
            filled = f"with another {' and '.join(changed)}" if changed else "by an earlier version"
            fix = f"use another folder: this one was filled {filled}"
            raise AttnEditError("stage2.cache", folder, fix)

    def _path(self, sequence: int) -> Path:
        return self.folder / f"{sequence // 1000:06d}" / f"{sequence:09d}.safetensors"

    def read(self, batch: Batch) -> TopK | None:
        """The distributions at all positions (B T, J) of a batch, if all are there."""
        parts: list[tuple[Tensor, Tensor]] = []
        for sequence in batch.sequences:
            try:
                with safe_open(self._path(sequence), framework="pt") as file:
                    parts.append((file.get_tensor("logp"), file.get_tensor("ids")))
            except (FileNotFoundError, SafetensorError):
                return None
        device = batch.input_ids.device
        logp = torch.cat([part[0] for part in parts]).to(device)
        return TopK(logp, torch.cat([part[1] for part in parts]).to(device, torch.int64))

    def write(self, batch: Batch, target: TopK) -> None:
        """Keep the distributions at all positions of a batch."""
        length = batch.input_ids.shape[1]
        pieces: Sequence[tuple[Tensor, Tensor]] = list(
            zip(target.logp.cpu().split(length), target.ids.to(torch.int32).cpu().split(length))
        )
        with disk_errors(self.folder):
            for sequence, (logp, ids) in zip(batch.sequences, pieces):
                path = self._path(sequence)
                path.parent.mkdir(exist_ok=True)
                temporary = path.with_suffix(f".{os.getpid()}.partial")
                save_file({"logp": logp.contiguous(), "ids": ids.contiguous()}, temporary)
                os.replace(temporary, path)
