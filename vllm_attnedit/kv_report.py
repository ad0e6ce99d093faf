"""The report behind ``attnedit kv``: a checkpoint's KV memory beside its teacher's.

The report is JSON-ready, and its fields are stable (new ones may be added)::

    checkpoint        as given
    base_model_type   the family
    kv_dtype          as given; bytes_per_element, its width
    block_size        tokens a block
    pp                pipeline stages; every number is of the stage which holds most
    memory_bytes      KV memory of a GPU, or null
    models            the one compared with first ("teacher"), then "edited" or previews:
      name            "teacher", "edited", "gateswa" or "mla"
      layers          number of layers by type
      sliding_window  keys a window layer sees, or null
      padding_layers  empty layers that vLLM adds, left out of all numbers
      per_gpu         one object for every tensor-parallel size:
        tp                 GPUs
        bytes_per_token    of one more token, in the long-context limit
        window_bytes       of full windows, once a request
        reduction          share of the teacher's bytes_per_token saved; null for the teacher
        more_than_teacher  whether it holds more than the teacher, per token or in a request below
        requests           one object for every length:
          length, bytes (exact tokens), block_bytes (whole blocks),
          reduction (of block_bytes; null for the teacher), fit (requests in memory_bytes, or null)
    more_than_teacher_at_tp   the tensor-parallel sizes where a model holds more than the teacher
    warnings          sentences for people
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm_attnedit.accounting import (
    KV_DTYPE_BYTES,
    kv_bytes_per_request,
    kv_bytes_per_token,
    kv_layers,
    padding_layers,
    requests_that_fit,
)
from vllm_attnedit.checkpoint import load_config
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit.patterns import EditPlan, build_edit
from vllm_attnedit.errors import AttnEditError

_FAR = 1 << 40
"""Tokens of a request so long that only what grows with it counts."""


def build_report(
    checkpoint: str,
    *,
    teacher: str | None = None,
    targets: list[str],
    lengths: list[int],
    tps: list[int],
    pp: int = 1,
    memory: int | None = None,
    kv_dtype: str = "auto",
    block_size: int = 16,
) -> dict[str, Any]:
    """Account for ``checkpoint`` and what it is compared with; see the module for the result.

    Args:
        checkpoint: folder, ``config.json`` or hub id, of an edited model or a plain teacher.
        teacher: the same, of the model to compare with; by default the one that was edited.
        targets: for a plain teacher, the edits to preview with default dimensions.
        lengths: tokens of a request.
        tps: tensor-parallel sizes.
        pp: pipeline stages.
        memory: bytes of KV memory on a GPU.
        kv_dtype: a key of ``KV_DTYPE_BYTES``.
        block_size: tokens a block.

    Raises:
        AttnEditError: for a checkpoint that cannot be read or arguments that do not fit it.
    """
    configs = _configs(checkpoint, teacher, targets)
    settings = {"kv_dtype": kv_dtype, "pp": pp}
    models = [
        _model(name, config, lengths, tps, memory, block_size, settings)
        for name, config in configs.items()
    ]
    for model in models[1:]:
        _compare(model, models[0])
    more = sorted(
        {gpu["tp"] for model in models for gpu in model["per_gpu"] if gpu["more_than_teacher"]}
    )
    return {
        "checkpoint": checkpoint,
        "base_model_type": _family(configs),
        "kv_dtype": kv_dtype,
        "bytes_per_element": KV_DTYPE_BYTES[kv_dtype],
        "block_size": block_size,
        "pp": pp,
        "memory_bytes": memory,
        "models": models,
        "more_than_teacher_at_tp": more,
        "warnings": [text for model in models for text in _warnings(model, models[0])],
    }


def _family(configs: dict[str, Any]) -> str:
    config = configs.get("edited", configs["teacher"])
    family: str = getattr(config, "base_model_type", config.model_type)
    return family


def _configs(checkpoint: str, teacher: str | None, targets: list[str]) -> dict[str, Any]:
    """The models of the report by name, the one compared with first."""
    config = load_config(checkpoint)
    if isinstance(config, AttnEditConfig):
        if targets:
            raise AttnEditError(
                "--target", ", ".join(targets), "leave it out: this model is edited"
            )
        other = config.teacher_config() if teacher is None else load_config(teacher, "--teacher")
        return {"teacher": other, "edited": config}
    if teacher is not None:
        raise AttnEditError(
            "--teacher", teacher, "leave it out: the checkpoint is not an edited one"
        )
    previews = {
        target: AttnEditConfig(
            config.model_type, build_edit(EditPlan(target=target), config), **config.to_dict()
        )
        for target in targets
    }
    return {"teacher": config, **previews}


def _model(
    name: str,
    config: Any,
    lengths: list[int],
    tps: list[int],
    memory: int | None,
    block_size: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    edit = getattr(config, "edit", None)
    if settings.get("kv_dtype") == "fp8" and edit is not None and edit.per_head_norm:
        fix = "use auto: with qk_norm per_head the cache holds float32 factors, and is never FP8"
        raise AttnEditError("kv_dtype", "fp8", fix)
    layers = kv_layers(config)
    windows = {layer.window for layer in layers if layer.window is not None}
    per_gpu = []
    for tp in tps:
        requests = []
        for length in lengths:
            blocks = {"tp": tp, "block_size": block_size, **settings}
            requests.append(
                {
                    "length": length,
                    "bytes": kv_bytes_per_request(config, length, tp=tp, **settings),
                    "block_bytes": kv_bytes_per_request(config, length, **blocks),
                    "reduction": None,
                    "fit": None
                    if memory is None
                    else requests_that_fit(config, length, memory, **blocks),
                }
            )
        slope = kv_bytes_per_token(config, tp=tp, **settings)
        # So far out the stage that holds most is the one that the slope is of.
        at_far = kv_bytes_per_request(config, _FAR, tp=tp, **settings)
        per_gpu.append(
            {
                "tp": tp,
                "bytes_per_token": slope,
                "window_bytes": at_far - slope * _FAR,
                "reduction": None,
                "more_than_teacher": False,
                "requests": requests,
            }
        )
    return {
        "name": name,
        "layers": dict(Counter(layer.layer_type for layer in layers)),
        "sliding_window": max(windows, default=None),
        "padding_layers": padding_layers(config),
        "per_gpu": per_gpu,
    }


def _compare(model: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Fill in what depends on the teacher."""
    for gpu, full in zip(model["per_gpu"], teacher["per_gpu"], strict=True):
        if full["bytes_per_token"]:
            gpu["reduction"] = 1 - gpu["bytes_per_token"] / full["bytes_per_token"]
        for request, whole in zip(gpu["requests"], full["requests"], strict=True):
            request["reduction"] = 1 - request["block_bytes"] / whole["block_bytes"]
        gpu["more_than_teacher"] = gpu["bytes_per_token"] > full["bytes_per_token"] or any(
            request["reduction"] < 0 for request in gpu["requests"]
        )


def _warnings(model: dict[str, Any], teacher: dict[str, Any]) -> list[str]:
    name, texts = model["name"], []
    latent = "latent_attention" in model["layers"]
    why = ": latents are not sharded, they stand whole on every GPU" if latent else ""
    for gpu, full in zip(model["per_gpu"], teacher["per_gpu"], strict=True):
        if gpu["more_than_teacher"]:
            held, whole = (of["bytes_per_token"] / 1024 for of in (gpu, full))
            texts.append(
                f"at TP {gpu['tp']} {name} holds MORE KV per GPU than the teacher's attention, "
                f"{held:g} KiB a token against {whole:g} KiB{why}"
            )
    if padding := model["padding_layers"]:
        texts.append(
            f"vLLM adds {padding} empty layers to {name}, left out here: make the number of window "
            "layers a multiple of that of full layers"
        )
    return texts
