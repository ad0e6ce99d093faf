"""Stage 1: every edited layer learns to answer as the teacher's layer does, all at once.

One pass of the teacher, without gradients, visits each layer's attention with its normed input x
and its output y after ``o_proj``. Right there, in a hook, the edited layer computes its own y' from
x, and its loss ``||y' - y||^2 / ||y||^2`` (per token, then averaged) goes backward. So only one
layer's activations are alive at a time, no gradient crosses layers, and the student as a whole
never runs.

Shapes: B sequences, T tokens, E hidden, L trained layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.attention import IMPLEMENTATION, build_masks
from training.config import Config
from training.data.batches import Batch
from training.flops import model_cost
from training.models import Trunk
from training.optim import Group
from training.parallel import Devices
from training.regions import compile_each, compile_function, teacher_parts
from training.sharded import clip
from training.stage import StepResult
from vllm_attnedit.config import LATENT, SLIDING, AttnEditConfig
from vllm_attnedit.edit.store import TensorStore
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.hf import GatedAttention, LatentAttention
from vllm_attnedit.hf.modeling import rotary_embedding


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """``||output - target||^2 / ||target||^2`` of each token, float32.

    Args:
        output: (B, T, E).
        target: (B, T, E).

    Returns:
        (B, T). A target of zeros, which has no scale of its own, counts as one of norm 1e-6.
    """
    target = target.float()
    energy = target.square().sum(-1).clamp(min=1e-12)
    return (output.float() - target).square().sum(-1) / energy


class LayerwiseStage:
    """Stage 1.

    Args:
        teacher: on the device, frozen, with packed attention.
        student: configuration of the edited model.
        store: its tensors, of which only attention is read.
        config: of the run.
        devices: of the run.
        form: of the masks.
    """

    name = "stage1"

    def __init__(
        self,
        teacher: Trunk,
        student: AttnEditConfig,
        store: TensorStore,
        config: Config,
        devices: Devices,
        form: str,
    ) -> None:
        self._teacher, self._student, self._devices, self._form = teacher, student, devices, form
        self.split_layers = config.stage1.split == "layers" and devices.ranks > 1
        self.layers = _chosen_layers(config.stage1.layers, student.num_hidden_layers)
        if self.split_layers and len(self.layers) < devices.ranks:
            fix = f"start at most {len(self.layers)} processes, one a layer; or set it to data"
            raise AttnEditError("stage1.split", f"layers, {devices.ranks} processes", fix)
        own = self.layers[devices.rank :: devices.ranks] if self.split_layers else self.layers
        student._attn_implementation = IMPLEMENTATION
        self.modules = {layer: _edited_layer(student, layer, store, devices) for layer in own}
        self.trained = {
            f"model.layers.{layer}.self_attn.{name}": parameter
            for layer, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }
        self.groups = [Group("attention", config.stage1.lr, self.trained)]
        rope = student.edit.qk_rope_head_dim
        self._rotary = rotary_embedding(student, rope).to(devices.device) if rope else None
        self._error: Callable[[Tensor, Tensor], Tensor] = compile_function(
            relative_error, config.run.compile
        )
        if config.run.compile:
            compile_each([*self.modules.values(), *teacher_parts(teacher.lm)])
        self._hooks = [
            teacher.attention(layer).register_forward_hook(
                self._hook(layer, module), with_kwargs=True
            )
            for layer, module in self.modules.items()
        ]
        self._masks: dict[str, Any] = {}
        self._positions: Tensor | None = None
        self._scale = 1.0
        self._losses = torch.zeros(len(self.layers), device=devices.device)
        self._cost = (model_cost(teacher.lm.config), model_cost(student, list(self.modules)))

    def close(self) -> None:
        """Take the hooks off the teacher."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, layer: int, module: nn.Module) -> Callable[..., None]:
        place = list(self.layers).index(layer)
        layer_type = self._student.edit.layer_types[layer]
        mask_type = SLIDING if layer_type == SLIDING else "full_attention"

        def learn(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            normed = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach()
            target = output[0].detach()
            rotations = kwargs["position_embeddings"]
            if layer_type == LATENT:
                assert self._rotary is not None
                rotations = self._rotary(normed, self._positions)
            with torch.enable_grad():
                # Leaving autocast drops its float32-to-bf16 copies of this layer's weights.
                with self._devices.autocast():
                    answer = module(
                        normed, position_embeddings=rotations, attention_mask=self._masks[mask_type]
                    )[0]
                loss = self._error(answer, target).mean()
                (loss * self._scale).backward()
            self._losses[place] += loss.detach() * self._scale

        return learn

    def run(self, batches: Sequence[Batch]) -> StepResult:
        self._losses.zero_()
        self._scale = 1.0 / len(batches)
        for batch in batches:
            on_device = batch.to(self._devices.device)
            self._masks = build_masks(on_device, self._form, self._student.sliding_window)
            self._positions = on_device.position_ids
            with torch.no_grad():
                self._teacher(on_device, self._masks)
        losses = self._devices.sum(self._losses.clone())
        if not self.split_layers:
            losses /= self._devices.ranks
            self._devices.average_gradients(self.trained.values())
        return StepResult(loss=losses.mean(), layers=losses)

    def clip(self, limit: float) -> Tensor:
        norms = [clip(list(module.parameters()), limit) for module in self.modules.values()]
        zero = torch.zeros((), device=self._devices.device)
        largest = torch.stack([zero, *norms]).max()
        if not self.split_layers:
            return largest
        # A maximum over processes may lose a NaN, but not an infinity.
        return self._devices.max(largest.nan_to_num(nan=float("inf"), posinf=float("inf")))

    def blame(self, batches: Sequence[Batch], result: StepResult) -> str:
        assert result.layers is not None
        for layer, loss in zip(self.layers, result.layers.tolist()):
            if loss != loss or loss in (float("inf"), float("-inf")):
                return f"layer {layer}"
        for layer, module in self.modules.items():
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if not all(torch.isfinite(gradient).all() for gradient in gradients):
                return f"gradient of layer {layer}"
        return "another process"

    def flops(self, batches: Sequence[Batch]) -> float:
        tokens = sum(batch.tokens for batch in batches)
        teacher, edited = self._cost
        forward = tokens * (teacher.attention + teacher.mlp) + teacher.pairs(batches)
        # Forward, weight gradients, and input gradients, which only o_proj and the softmax need.
        train = tokens * (2 * edited.attention + edited.output) + 3 * edited.pairs(batches)
        return forward + train


def _chosen_layers(requested: list[int] | None, count: int) -> list[int]:
    layers = sorted(set(requested)) if requested else list(range(count))
    if layers[0] < 0 or layers[-1] >= count:
        raise AttnEditError("stage1.layers", requested, f"use layers 0 to {count - 1}")
    return layers


def _edited_layer(
    config: AttnEditConfig, layer: int, store: TensorStore, devices: Devices
) -> nn.Module:
    """One edited attention with its weights from the store, as float32 master weights."""
    latent = config.edit.layer_types[layer] == LATENT
    module = (LatentAttention if latent else GatedAttention)(config, layer)
    prefix = f"model.layers.{layer}.self_attn."
    state = {name: store.load(prefix + name).float() for name in module.state_dict()}
    module.load_state_dict(state)
    return module.to(devices.device).train()
