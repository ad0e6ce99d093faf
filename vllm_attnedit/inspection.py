"""The report behind ``attnedit inspect``: what an edited checkpoint holds, from its headers.

The report is JSON-ready, and its fields are stable (new ones may be added)::

    checkpoint        the folder
    base_model_type   the teacher's family
    attention_edit    as in config.json
    layers            runs of equal layers, each with first, last, layer_type and what applies of
                      sliding_window, gate and the latent dimensions
    parameters, bytes each with attention, rest and total
    dtypes            parameters by dtype
    added, removed    against the teacher, tensors of equal name in all layers together, each with
                      tensor, count, parameters; a tensor of another shape is in both
    problems          tensors that are missing, unexpected or misshapen, a sentence each; of a
                      quantised checkpoint layers without any tensor, and tensors misshapen
    provenance        as in config.json
    files             each with name and bytes
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from vllm_attnedit.checkpoint import load_config
from vllm_attnedit.config import LATENT, SLIDING, AttentionEdit, AttnEditConfig
from vllm_attnedit.edit.store import SafetensorsStore, TensorInfo
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.tensors import expected_tensors

_LATENT_FIELDS = (
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "q_lora_rank",
)
_LAYER_PREFIX = re.compile(r"^model\.layers\.\d+\.")
_HEAD = "lm_head.weight"

Shapes = Mapping[str, tuple[int, ...]]


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Describe the edited checkpoint in ``folder``; see the module for the result.

    Raises:
        AttnEditError: if it is not an edited checkpoint, or a file is missing or damaged.
    """
    if not folder.is_dir():
        raise AttnEditError("checkpoint", folder, "give the folder of an edited checkpoint")
    config = load_config(folder)
    if not isinstance(config, AttnEditConfig):
        fix = "give an edited checkpoint; 'attnedit edit' makes one from this teacher"
        raise AttnEditError("checkpoint", f"{folder} (model_type {config.model_type})", fix)
    found = _headers(folder)
    expected = expected_tensors(config)
    teacher = expected_tensors(
        AttnEditConfig(config.base_model_type, **config.teacher_config().to_dict())
    )
    return {
        "checkpoint": str(folder),
        "base_model_type": config.base_model_type,
        "attention_edit": config.attention_edit,
        "layers": layer_runs(config.edit),
        **_sizes(found),
        "added": _difference(expected, teacher),
        "removed": _difference(teacher, expected),
        "problems": _problems(found, expected, getattr(config, "quantization_config", None)),
        "provenance": config.provenance,
        "files": [
            {"name": str(path.relative_to(folder)), "bytes": path.stat().st_size}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ],
    }


def _headers(folder: Path) -> Mapping[str, TensorInfo]:
    try:
        store = SafetensorsStore(folder)
    except AttnEditError as error:
        if error.field != "TEACHER":
            raise
        raise AttnEditError("checkpoint", folder, "give a folder with safetensors") from error
    store.close()
    return store.tensors


def layer_runs(edit: AttentionEdit) -> list[dict[str, Any]]:
    """Runs of equal layers, in order: ``first``, ``last``, ``layer_type`` and what applies."""
    runs = []
    for layer_type, group in groupby(enumerate(edit.layer_types), key=lambda item: item[1]):
        indices = [index for index, _ in group]
        run: dict[str, Any] = {"first": indices[0], "last": indices[-1], "layer_type": layer_type}
        if layer_type == SLIDING:
            run["sliding_window"] = edit.sliding_window
        if layer_type == LATENT:
            run |= {name: getattr(edit, name) for name in _LATENT_FIELDS}
        runs.append(run | {"gate": edit.gate})
    return runs


def _sizes(found: Mapping[str, TensorInfo]) -> dict[str, Any]:
    parameters: Counter[str] = Counter(attention=0, rest=0)
    sizes: Counter[str] = Counter(attention=0, rest=0)
    dtypes: Counter[str] = Counter()
    for name, info in found.items():
        part = "attention" if ".self_attn." in name else "rest"
        count = prod(info.shape)
        parameters[part] += count
        sizes[part] += count * info.dtype.itemsize
        dtypes[str(info.dtype).removeprefix("torch.")] += count
    return {
        "parameters": {**parameters, "total": parameters.total()},
        "bytes": {**sizes, "total": sizes.total()},
        "dtypes": dict(dtypes),
    }


def _difference(tensors: Shapes, others: Shapes) -> list[dict[str, Any]]:
    """What ``tensors`` has and ``others`` lacks or has in another shape, layers put together."""
    count: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for name, shape in tensors.items():
        if others.get(name) != shape:
            short = _LAYER_PREFIX.sub("", name)
            count[short] += 1
            parameters[short] += prod(shape)
    return [
        {"tensor": name, "count": count[name], "parameters": parameters[name]} for name in count
    ]


def _problems(found: Mapping[str, TensorInfo], expected: Shapes, quantised: object) -> list[str]:
    # A quantised layer spells its weight in its method's own way: qweight and scales, for instance.
    modules = {_module(name) for name in found} if quantised else set()
    names = [name for name in expected if _module(name) not in modules]
    problems = [f"{name} is missing" for name in names if name not in found]
    for name, info in found.items():
        if name not in expected:
            # The head is stored beside a tied embedding by some writers, and not read.
            if name != _HEAD and not quantised:
                problems.append(f"{name} is unexpected")
        elif info.shape != expected[name]:
            problems.append(
                f"{name} is {list(info.shape)}, config.json asks for {list(expected[name])}"
            )
    return problems


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
