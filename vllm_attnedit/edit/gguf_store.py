"""Teachers in a GGUF file: its tensors dequantised one at a time, under the names of transformers.

transformers reads the configuration and the tokenizer; this module corrects what it leaves out and
streams the weights, which transformers would hold all at once. Formats: the GGUF specification and
llama.cpp's ``convert_hf_to_gguf.py``, whose conversions are undone here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from torch import Tensor
from transformers import AutoConfig

from vllm_attnedit.edit.store import TensorInfo
from vllm_attnedit.errors import AttnEditError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TIED_DISTANCE = 0.2
"""Head and embedding nearer than this (relative, Frobenius) are one matrix quantised twice: 4-bit
rounding moves a matrix by less than 0.1, while two matrices trained apart are about 1.4 apart."""


@lru_cache(maxsize=2)
def _read(path: Path, _size: int, _changed_ns: int) -> tuple[GGUFReader, Any]:
    """A file's reader and its configuration as transformers reads it.

    The two take seconds, most of it for the vocabulary, and a command opens its teacher several
    times. Size and time of the last change belong to the key.
    """
    reader = GGUFReader(path)
    # The reader keeps an array object for every token and merge: a gigabyte for 150K tokens.
    for key in [k for k in reader.fields if k.startswith("tokenizer.")]:
        del reader.fields[key]
    _check_architecture(reader)
    return reader, AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def _check_architecture(reader: GGUFReader) -> None:
    architecture = _field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        fix = f"use a teacher of a supported family ({', '.join(ARCHITECTURES)})"
        raise AttnEditError("general.architecture", architecture, fix)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


class GgufStore:
    """The tensors of one GGUF file, in float32.

    Attributes:
        config: the teacher's configuration.

    Raises:
        AttnEditError: for a damaged file, an unsupported architecture, or RoPE scaling, which
            transformers does not read from GGUF.
    """

    def __init__(self, path: Path) -> None:
        try:
            about = path.stat()
            self._reader, config = _read(path.absolute(), about.st_size, about.st_mtime_ns)
        except AttnEditError:
            raise  # an architecture that is not supported
        except (ValueError, KeyError, IndexError, OSError) as error:
            fix = "download the file again, it is truncated or no GGUF file"
            raise AttnEditError(path.name, error, fix) from error
        self._architecture = str(_field(self._reader, "general.architecture"))
        # Each tensor, and which expert of it; None for a tensor that is not a stack of experts.
        self._where: dict[str, tuple[ReaderTensor, int | None]] = {}
        infos: dict[str, TensorInfo] = {}
        for tensor in self._reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            for name, expert in _names(tensor.name, shape):
                self._where[name] = (tensor, expert)
                part = shape if expert is None else shape[1:]
                infos[name] = TensorInfo(part, torch.float32, None)
        self.tensors: Mapping[str, TensorInfo] = infos
        # Callers change theirs.
        self.config = self._complete(copy.deepcopy(config))
        if self.config.tie_word_embeddings:
            infos.pop("lm_head.weight", None)

    def _complete(self, config: Any) -> Any:
        """The configuration with what transformers leaves out."""
        prefix = self._architecture
        scaling = _field(self._reader, f"{prefix}.rope.scaling.type")
        # Older files state the factor of a linear scaling, and no type.
        factors = (
            _field(self._reader, f"{prefix}.rope.{k}") for k in ("scaling.factor", "scale_linear")
        )
        if scaling is None and any(factor not in (None, 0, 1) for factor in factors):
            scaling = "linear"
        if scaling not in (None, "none") or any(
            t.name == "rope_freqs.weight" for t in self._reader.tensors
        ):
            fix = "use the safetensors checkpoint: RoPE scaling cannot be read from GGUF"
            raise AttnEditError("rope scaling", scaling or "rope_freqs.weight", fix)
        for key, name in (
            ("attention.key_length", "head_dim"),
            ("expert_feed_forward_length", "moe_intermediate_size"),
        ):
            value = _field(self._reader, f"{prefix}.{key}")
            if value is not None and (name == "head_dim" or hasattr(config, name)):
                setattr(config, name, int(value))
        if not config.tie_word_embeddings and self._head_is_embedding():
            config.tie_word_embeddings = True
        return config

    def _head_is_embedding(self) -> bool:
        """Whether the stored head is the embedding, quantised separately (Qwen's files do that)."""
        names = ("lm_head.weight", "model.embed_tokens.weight")
        if self.tensors[names[0]].shape != self.tensors[names[1]].shape:
            return False
        # A thousand rows tell; the whole of both would be gigabytes.
        head, embedding = (self.head(name, 1000 * self.tensors[name].shape[1]) for name in names)
        return bool((head - embedding).norm() < _TIED_DISTANCE * embedding.norm())

    def load(self, name: str) -> Tensor:
        tensor, expert = self._where[name]
        data = tensor.data if expert is None else tensor.data[expert]
        values = torch.from_numpy(np.array(dequantize(data, tensor.tensor_type), dtype=np.float32))
        values = values.reshape(self.tensors[name].shape)
        if self._architecture == "llama":
            if ".q_proj." in name:
                values = _unpermute(values, self.config.num_attention_heads)
            elif ".k_proj." in name:
                values = _unpermute(values, self.config.num_key_value_heads)
        return values

    def head(self, name: str, elements: int) -> Tensor:
        tensor, expert = self._where[name]
        width = self.tensors[name].shape[-1]
        data = tensor.data if expert is None else tensor.data[expert]
        if data.ndim == 1 or ".self_attn." in name:  # permuted rows have no head of their own
            return self.load(name).flatten()[:elements]
        rows = data[: -(-elements // width)]
        return torch.from_numpy(
            np.array(dequantize(rows, tensor.tensor_type), dtype=np.float32)
        ).flatten()

    def close(self) -> None:
        self._where.clear()


def _names(gguf_name: str, shape: tuple[int, ...]) -> list[tuple[str, int | None]]:
    """transformers' names for a GGUF tensor: one, or one an expert; its own name if unknown."""
    if gguf_name in _TOP:
        return [(_TOP[gguf_name], None)]
    block = _BLOCK.fullmatch(gguf_name)
    if block is None:
        return [(gguf_name, None)]
    layer, part, kind = block.groups()
    prefix = f"model.layers.{layer}."
    if part in _EXPERTS:
        middle = f"{prefix}mlp.experts."
        return [(f"{middle}{e}.{_EXPERTS[part]}.{kind}", e) for e in range(shape[0])]
    return [(f"{prefix}{_IN_LAYER[part]}.{kind}" if part in _IN_LAYER else gguf_name, None)]


def _unpermute(rows: Tensor, heads: int) -> Tensor:
    """Rows of a llama q or k projection in half-rotation order, from llama.cpp's interleaving."""
    half = rows.shape[0] // heads // 2
    split = rows.reshape(heads, half, 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)
