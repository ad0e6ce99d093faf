"""Strict weight loading: a missing, unexpected or misshapen tensor is refused by its name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping
from vllm.model_executor.model_loader.weight_utils import (
    default_weight_loader,
    maybe_remap_kv_scale_name,
)
from vllm.model_executor.models.utils import is_pp_missing_parameter

from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.tensors import expected_tensors

# checkpoint name -> (fused parameter, shard), inside self_attn or a dense mlp
_FUSED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_FUSED_NAME = re.compile(r"\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.")
_EXPERTS = ".experts."
_EXPERT_NAME = re.compile(r"experts\.\d+\.\w+\.")
# What a quantised checkpoint may leave out: scales of inputs and of the KV cache, which are one or
# computed then, and the order of groups, the natural one then; methods of experts keep room for it
# whether or not there is any.
_OPTIONAL = re.compile(
    r"((?<!weight)_scale|_zero_point|\.g_idx|\.experts\..*g_idx(_sort_indices)?)$"
)
_FIX_CHECKPOINT = "write the checkpoint again with `attnedit edit`, or copy it again"


class WeightLoader:
    """Loads one stream of checkpoint tensors into a model's parameters.

    Quantised checkpoints spell the tensors of quantised layers in their method's own way, so there
    only what stays unquantised is held to the schema, and names to the model's parameters.
    """

    def __init__(self, model: nn.Module, config: AttnEditConfig, quantized: bool) -> None:
        self.model = model
        self.quantized = quantized
        self.tied = bool(config.tie_word_embeddings)
        self.expected = expected_tensors(config)
        self.params = dict(model.named_parameters())
        self.loaded: set[str] = set()
        self.seen: set[str] = set()
        # parameter -> which parts of it came: (shard, expert) of what is fused, else (None, None)
        self.filled: dict[str, set[tuple[Any, int | None]]] = defaultdict(set)
        # expert weight as the checkpoint names it -> (parameter prefix, expert, shard)
        self.experts: dict[str, tuple[str, int, str]] = {}
        if config.family.moe:
            for param, name, expert, shard in fused_moe_make_expert_params_mapping(
                model, "gate_proj", "down_proj", "up_proj", config.num_experts
            ):
                self.experts[name] = (param, expert, shard)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all; returns the names of the parameters that were filled.

        Raises:
            AttnEditError: naming the tensor and what is wrong with it.
        """
        for name, tensor in weights:
            if name.endswith("rotary_emb.inv_freq"):
                continue  # old checkpoints store what follows from the configuration
            if self.tied and name.startswith("lm_head."):
                continue
            self._check(name, tensor)
            self._load_one(name, tensor)
        self._check_complete()
        return self.loaded

    def _check(self, name: str, tensor: Tensor) -> None:
        self.seen.add(name)
        shape = self.expected.get(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise AttnEditError(
                name,
                f"shape {tuple(tensor.shape)}",
                f"config.json wants {shape}: {_FIX_CHECKPOINT}",
            )
        if shape is None and not self.quantized:
            raise AttnEditError(
                name, "unexpected tensor", f"config.json has no use for it: {_FIX_CHECKPOINT}"
            )

    def _load_one(self, name: str, tensor: Tensor) -> None:
        if self.quantized and "scale" in name:
            remapped = maybe_remap_kv_scale_name(name, self.params)
            if remapped is None:
                return
            name = remapped
        if self._load_expert(name, tensor):
            return
        shard = None
        match = _FUSED_NAME.search(name)
        if match is not None:
            fused, shard = _FUSED[match[2]]
            target = name.replace(f".{match[2]}.", f".{fused}.")
            # The q_proj of a latent layer stands alone.
            if target in self.params or is_pp_missing_parameter(target, self.model):
                name = target
            else:
                shard = None
        if is_pp_missing_parameter(name, self.model):
            return
        if name not in self.params:
            if self.quantized and name.endswith((".bias", ".g_idx")):
                return  # written by GPTQ for layers that have none
            raise AttnEditError(name, "unexpected tensor", _FIX_CHECKPOINT)
        param = self.params[name]
        loader = getattr(param, "weight_loader", default_weight_loader)
        if shard is None or loader is default_weight_loader:
            loader(param, tensor)
        else:
            loader(param, tensor, shard)
        self.loaded.add(name)
        self.filled[name].add((shard, None))

    def _load_expert(self, name: str, tensor: Tensor) -> bool:
        """Whether ``name`` is a routed expert's tensor; loads it if it lives on this rank."""
        match = _EXPERT_NAME.search(name)
        if match is None or match[0] not in self.experts:
            return False
        prefix, expert, shard = self.experts[match[0]]
        target = name.replace(match[0], prefix)
        if is_pp_missing_parameter(target, self.model):
            return True
        if target not in self.params:
            raise AttnEditError(name, "unexpected tensor", _FIX_CHECKPOINT)
        param: Any = self.params[target]
        local = param.weight_loader(
            param, tensor, target, shard_id=shard, expert_id=expert, return_success=True
        )
        if local:
            self.loaded.add(target)
            self.filled[target].add((shard, expert))
        return True

    def _check_complete(self) -> None:
        # Other ranks may have other experts, whose tensors vLLM can leave out of this one's stream.
        missing = [
            name
            for name in self.expected
            if name not in self.seen
            and _EXPERTS not in name
            and (not self.quantized or name in self.params)
        ]
        for name in self.params:
            if _EXPERTS in name and not _OPTIONAL.search(name):
                missing += self._missing_experts(name)
            elif self.quantized and not _OPTIONAL.search(name):
                missing += self._missing_parts(name)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise AttnEditError(missing[0], f"missing{more}", _FIX_CHECKPOINT)

    def _missing_experts(self, name: str) -> list[str]:
        """What did not come of a parameter of stacked experts, as the checkpoint names it."""
        came, held = self.filled[name], self.params[name].shape[0]  # the experts of this rank
        by_shard: dict[str, list[str]] = defaultdict(list)
        for tensor, (prefix, expert, shard) in self.experts.items():
            if f".{prefix}" in name and (shard, expert) not in came:
                by_shard[shard].append(name.replace(prefix, tensor))
        absent = []
        for shard, tensors in by_shard.items():
            lacking = held - sum(s == shard for s, _ in came)
            if lacking <= 0:
                continue
            unseen = [tensor for tensor in tensors if tensor not in self.seen]
            # Of a stream without other ranks' experts it is not known which are this one's.
            some = [f"{name}, {shard} of {lacking} of its {held} experts"]
            absent += unseen if len(unseen) == lacking else some
        return absent

    def _missing_parts(self, name: str) -> list[str]:
        """What did not come of any other parameter, as the checkpoint names it."""
        came = self.filled[name]
        parts = {n: (f, shard) for n, (f, shard) in _FUSED.items() if f".{f}." in name}
        if not parts or came == {(None, None)}:
            return [] if came else [name]
        return [
            name.replace(f".{fused}.", f".{part}.")
            for part, (fused, shard) in parts.items()
            if (shard, None) not in came
        ]
