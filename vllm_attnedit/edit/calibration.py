"""Runs a teacher on some text, to see which inputs matter to each of its attention layers.

The teacher runs one layer at a time, all text through a layer before the next one is loaded, so
that memory stays at one layer whatever the model's size.

Shapes: B windows of text, T tokens a window, E hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_attnedit.edit.layout import unedited
from vllm_attnedit.edit.statistics import Collector, InputStatistics
from vllm_attnedit.edit.store import TensorStore, load_finite
from vllm_attnedit.edit.teacher import Teacher
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.families import get_family
from vllm_attnedit.tensors import is_moe_layer

DEFAULT_TOKENS = 4096
WINDOW = 512
"""Tokens that run together: enough for attention sinks to form, few enough for eager attention."""
_CHARACTERS_A_TOKEN = 16


@dataclass(frozen=True)
class Calibration:
    """Text to run the teacher on.

    Attributes:
        text: long enough for ``tokens``; what is beyond is not used.
        source: what it is, for provenance.
        tokens: how many of its tokens to use.
        device: where the teacher's layers run.
    """

    text: str
    source: str
    tokens: int = DEFAULT_TOKENS
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise AttnEditError("--calibration-tokens", self.tokens, "give an integer >= 1")
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA was compiled in
            reason = str(error).splitlines()[0]
            fix = f"use cpu, or a device that torch has here ({reason})"
            raise AttnEditError("--calibration-device", self.device, fix) from error

    @classmethod
    def from_file(
        cls, path: Path, tokens: int = DEFAULT_TOKENS, device: str = "cpu"
    ) -> Calibration:
        """Text of a UTF-8 file.

        Raises:
            AttnEditError: if it cannot be read.
        """
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(tokens * _CHARACTERS_A_TOKEN)
        except (OSError, UnicodeDecodeError) as error:
            raise AttnEditError(
                "--calibration", path, f"give a UTF-8 text file ({error})"
            ) from error
        return cls(text, path.name, tokens, device)

    @classmethod
    def builtin(cls, tokens: int = DEFAULT_TOKENS, device: str = "cpu") -> Calibration:
        """Python's own language reference, which every installation carries: English and some code.

        Raises:
            AttnEditError: if this installation lacks it.
        """
        try:
            topics: dict[str, str] = import_module("pydoc_data.topics").topics
        except ImportError:
            fix = "give --calibration a text file: this Python has no built-in documentation"
            raise AttnEditError("--calibration", "builtin", fix) from None
        text = "\n\n".join(topics[name] for name in sorted(topics))
        return cls(text[: tokens * _CHARACTERS_A_TOKEN], "pydoc_data.topics", tokens, device)

    def describe(self) -> dict[str, Any]:
        """For provenance."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        return {"source": self.source, "sha256": digest, "tokens": self.tokens}

    def windows(self, tokenizer: Any) -> Tensor:
        """Token ids (B, T), every window begun as the tokenizer begins a text.

        Raises:
            AttnEditError: if the text is too short.
        """
        start = list(tokenizer("").input_ids)
        # verbose: its warning of texts beyond the model's length does not apply, they are cut here.
        ids = tokenizer(self.text, add_special_tokens=False, verbose=False).input_ids[: self.tokens]
        length = min(WINDOW - len(start), self.tokens)
        count = len(ids) // length
        if count == 0:
            fix = f"give a longer text or a smaller --calibration-tokens: it has {len(ids)} tokens"
            raise AttnEditError("--calibration", self.source, fix)
        rows = torch.tensor(ids[: count * length]).view(count, length)
        return torch.cat([torch.tensor([start] * count, dtype=torch.long).view(count, -1), rows], 1)


def run_statistics(teacher: Teacher, calibration: Calibration) -> Iterator[InputStatistics]:
    """Statistics of each layer in turn; the teacher runs as the iterator is advanced."""
    config, store = teacher.config, teacher.store
    ids = calibration.windows(teacher.load_tokenizer())
    if int(ids.max()) >= config.vocab_size:
        fix = f"use the teacher's own tokenizer: its ids must be below {config.vocab_size}"
        raise AttnEditError("tokenizer", int(ids.max()), fix)
    device = torch.device(calibration.device)
    family = get_family(config.model_type)
    modeling = import_module(family.modeling_module)
    config._attn_implementation = "eager"  # the one that returns attention weights
    config._experts_implementation = "eager"
    embedding = load_finite(store, "model.embed_tokens.weight")
    hidden = embedding[ids].float()  # (B, T, E)
    del embedding
    length = ids.shape[1]
    positions = torch.arange(length, device=device)[None]
    rotary = getattr(modeling, f"{family.class_prefix}RotaryEmbedding")(config=config).to(device)
    rotation = rotary(hidden[:1].to(device), positions)
    mask = torch.full((length, length), torch.finfo(torch.float32).min, device=device).triu(1)
    for index in range(config.num_hidden_layers):
        layer = load_layer(store, config, index).to(device)
        collect = Collector(layer, family.qkv_bias(config))
        for row in range(len(hidden)):
            with torch.no_grad():
                hidden[row : row + 1] = layer(
                    hidden[row : row + 1].to(device),
                    attention_mask=mask[None, None],
                    position_ids=positions,
                    position_embeddings=rotation,
                ).cpu()
        result = collect.result()
        del layer, collect  # freed before the caller and the next layer need room
        yield result


def load_layer(store: TensorStore, config: Any, index: int) -> nn.Module:
    """One decoder layer of the teacher in float32, for evaluation."""
    family = get_family(config.model_type)
    modeling = import_module(family.modeling_module)
    with torch.device("meta"):
        layer: nn.Module = getattr(modeling, f"{family.class_prefix}DecoderLayer")(config, index)
    prefix = f"model.layers.{index}."
    stacked = is_moe_layer(unedited(config), index)
    state: dict[str, Tensor] = {}
    for name in layer.state_dict():
        if name.startswith("mlp.experts.") and stacked:
            state[name] = _stack_experts(store, f"{prefix}mlp.experts.", name, config.num_experts)
        else:
            state[name] = load_finite(store, prefix + name).float()
    layer.load_state_dict(state, assign=True)
    return layer.eval().requires_grad_(False)


def _stack_experts(store: TensorStore, prefix: str, name: str, experts: int) -> Tensor:
    """transformers' stacked form of the experts' projections; gate and up are one, gate first."""
    parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
    first = [load_finite(store, f"{prefix}0.{part}.weight") for part in parts]
    rows = sum(len(t) for t in first)
    stacked = torch.empty(experts, rows, first[0].shape[1])
    for expert in range(experts):
        torch.cat(
            [load_finite(store, f"{prefix}{expert}.{part}.weight").float() for part in parts],
            out=stacked[expert],
        )
    return stacked
