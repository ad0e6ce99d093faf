"""Stage 2: the student on its own activations, towards the teacher's next-token distributions.

Loss: KL(teacher || student) averaged over the positions that count, plus an optional cosine term on
the hidden states after every layer. The student and its loss are one module, so that a sharded
head is whole while the loss needs it.

Shapes: B sequences, T tokens, N loss positions, E hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.attention import build_masks
from training.config import Config
from training.data.batches import Batch
from training.flops import model_cost
from training.kl import Target, chunked_kl
from training.models import Trunk, is_attention, layer_of, select_trained
from training.optim import Group
from training.parallel import Devices
from training.regions import checkpoint_each, compile_each
from training.sharded import clip, local, sync_gradients
from training.stage import StepResult
from training.targets import LayerStates, TeacherTargets, TopKCache


def cosine_distance(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """``1 - cos`` between hidden states (B, T, E), averaged over tokens and layers."""
    distances = [
        1 - functional.cosine_similarity(a.float(), b.float(), dim=-1).mean()
        for a, b in zip(mine, theirs, strict=True)
    ]
    return torch.stack(distances).mean()


class StudentLoss(nn.Module):
    """The student with its loss on top."""

    def __init__(self, student: Trunk, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.student = student
        self._stage, self._compiled, self._dtype = config.stage2, config.run.compile, dtype
        self._states = LayerStates(student) if config.stage2.cosine_weight else None

    def forward(
        self, batch: Batch, masks: dict[str, Any], target: Target, states: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of KL over loss positions, agreements among them, mean cosine distance."""
        hidden = self.student(batch, masks)
        kept = batch.pick(hidden.flatten(0, 1)).to(self._dtype)
        kl, agreed = chunked_kl(
            kept,
            self.student.head.to(self._dtype),
            target,
            batch.loss_weight,
            chunk=self._stage.chunk_tokens,
            fp32_logits=self._stage.fp32_logits,
            compiled=self._compiled,
        )
        if self._states is None:
            return kl, agreed, torch.zeros_like(kl)
        return kl, agreed, cosine_distance(self._states.take(), states)


class DistillStage:
    """Stage 2.

    Args:
        teacher: on the device, frozen, with packed attention.
        student: on the device, frozen, with packed attention; what trains is marked here.
        config: of the run.
        devices: of the run.
        form: of the masks.
        cache: for top-k teacher distributions.
    """

    name = "stage2"
    layers: Sequence[int] = ()
    split_layers = False

    def __init__(
        self,
        teacher: Trunk,
        student: Trunk,
        config: Config,
        devices: Devices,
        form: str,
        cache: TopKCache | None = None,
    ) -> None:
        stage = config.stage2
        self._devices, self._form, self._stage = devices, form, stage
        self._student, self._gather_once = student, not config.run.shard_frozen
        select_trained(student.lm, stage.trainable == "all", devices.compute_dtype)
        if config.run.compile:
            compile_each([*student.layers, *teacher.layers])
        if config.run.gradient_checkpointing:
            checkpoint_each(student.layers)
        self.module = StudentLoss(student, config, devices.compute_dtype)
        devices.shard(self.module, student.layers)
        devices.shard(teacher, teacher.layers)
        self.trained = {n: p for n, p in student.lm.named_parameters() if p.requires_grad}
        attention = {n: p for n, p in self.trained.items() if is_attention(n)}
        rest = {n: p for n, p in self.trained.items() if not is_attention(n)}
        self.groups = [Group("attention", stage.lr, attention)]
        if rest:
            self.groups.append(Group("rest", stage.lr_rest, rest))
        self._targets = TeacherTargets(
            teacher,
            k=stage.top_k,
            chunk=stage.chunk_tokens,
            fp32_logits=stage.fp32_logits,
            states=stage.cosine_weight > 0,
            cache=cache,
            anywhere=devices.any if devices.sharded else bool,
        )
        self._window = student.lm.config.sliding_window
        self._cost = (model_cost(teacher.lm.config), model_cost(student.lm.config))
        self.module.train()

    def run(self, batches: Sequence[Batch]) -> StepResult:
        device, ranks = self._devices.device, self._devices.ranks
        counted = torch.tensor(float(sum(b.loss_tokens for b in batches)), device=device)
        # A batch without an answer in it has nothing to learn, and must not divide by zero.
        positions = self._devices.sum(counted).clamp(min=1)
        sums = torch.zeros(3, device=device)
        for number, batch in enumerate(batches):
            sync_gradients(self.module, number == len(batches) - 1, self._gather_once)
            on_device = batch.to(device)
            masks = build_masks(on_device, self._form, self._window)
            target, states = self._targets(on_device, masks)
            with self._devices.autocast():
                kl, agreed, distance = self.module(on_device, masks, target, states)
            # Gradients are averaged over processes: their number turns that into a sum.
            loss = kl * (ranks / positions) + self._stage.cosine_weight * distance / len(batches)
            loss.backward()
            sums += torch.stack([kl.detach(), agreed, distance.detach() / len(batches)])
        self._devices.average_gradients(self.trained.values())
        kl, agreed, distance = self._devices.sum(sums).unbind()
        kl, distance = kl / positions, distance / ranks
        metrics = {"kl": kl, "agreement": agreed / positions}
        if self._stage.cosine_weight:
            metrics["cosine"] = distance
        return StepResult(loss=kl + self._stage.cosine_weight * distance, metrics=metrics)

    def clip(self, limit: float) -> Tensor:
        return clip(list(self.trained.values()), limit)

    @torch.no_grad()
    def blame(self, batches: Sequence[Batch], result: StepResult) -> str:
        for name in self._not_finite(self.trained):
            return f"weights of layer {layer_of(name)} ({name})"
        seen = torch.zeros(len(self._student.layers), device=self._devices.device)

        def watch(layer: int) -> Any:
            def look(_module: Any, _args: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                seen[layer] += (~torch.isfinite(hidden)).any()

            return look

        hooks = [
            layer.register_forward_hook(watch(i)) for i, layer in enumerate(self._student.layers)
        ]
        try:
            for batch in batches:
                on_device = batch.to(self._devices.device)
                masks = build_masks(on_device, self._form, self._window)
                target, states = self._targets(on_device, masks)
                with self._devices.autocast():
                    self.module(on_device, masks, target, states)
        finally:
            for hook in hooks:
                hook.remove()
        if self._devices.max(seen).any():
            return f"output of layer {int(seen.nonzero()[0])}"
        # Backward runs from the last layer: the one nearest the loss is where it began.
        gradients = {n: p if p.grad is None else p.grad for n, p in self.trained.items()}
        bad = [layer_of(name) for name in self._not_finite(gradients)]
        layers = [layer for layer in bad if layer is not None]
        return f"gradient of layer {max(layers)}" if layers else "the loss itself"

    def _not_finite(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of what is not finite on some process: each holds a part, all must agree."""
        bad = [(~torch.isfinite(local(tensor))).any() for tensor in tensors.values()]
        flags = self._devices.max(torch.stack(bad).float())
        return [name for name, flag in zip(tensors, flags.tolist()) if flag]

    def flops(self, batches: Sequence[Batch]) -> float:
        tokens = sum(batch.tokens for batch in batches)
        teacher, student = self._cost
        forward = tokens * (teacher.attention + teacher.mlp + teacher.head) + teacher.pairs(batches)
        matrices = student.attention + student.mlp + student.head
        weights = matrices if self._stage.trainable == "all" else student.attention
        train = tokens * (2 * matrices + weights) + 3 * student.pairs(batches)
        return forward + train
