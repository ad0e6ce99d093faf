"""The configuration of a checkpoint, from wherever the user has it: a folder, a file or the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    StrictDataclassError,
)
from transformers import CONFIG_MAPPING, PreTrainedConfig

from vllm_attnedit.config import MODEL_TYPE, AttnEditConfig
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.families import get_family

CONFIG_NAME = "config.json"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DIMENSIONS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")


def load_config(source: str | Path, field: str = "checkpoint") -> PreTrainedConfig:
    """The configuration of an edited checkpoint or of a plain teacher.

    Args:
        source: a checkpoint folder, a ``config.json``, or a model id on the Hugging Face hub, of
            which only the ``config.json`` is fetched.
        field: how the user spells ``source``, for messages.

    Returns:
        An ``AttnEditConfig``, or the transformers configuration of a teacher of a supported family.

    Raises:
        AttnEditError: if there is none, it cannot be read, or its content is not valid.
    """
    path = _config_path(source, field)
    data = read_json(path)
    if data.get("model_type") == MODEL_TYPE:
        cls: Any = AttnEditConfig
        if "base_model_type" not in data:
            raise AttnEditError("base_model_type", None, f"name the teacher's model_type in {path}")
    else:
        cls = CONFIG_MAPPING[get_family(data.get("model_type"), "model_type").model_type]
    for name in _DIMENSIONS:
        if name in data and not (type(data[name]) is int and data[name] >= 1):
            raise AttnEditError(name, data[name], f"give an integer >= 1 in {path}")
    try:
        config: PreTrainedConfig = cls.from_dict(data)
    except StrictDataclassError as error:
        raise AttnEditError(str(path), error, "mend this field") from error
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        AttnEditError: if the file cannot be read as one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AttnEditError(str(path), error.strerror, "give a file that can be read") from error
    except ValueError as error:  # malformed JSON or UTF-8
        raise AttnEditError(str(path), error, "give a file with one JSON object") from error
    if not isinstance(data, dict):
        raise AttnEditError(str(path), type(data).__name__, "give a file with one JSON object")
    return data


def _config_path(source: str | Path, field: str) -> Path:
    path = Path(source)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a part of it is too long, or lies where nobody may look
        fix = f"give a shorter name, or one that can be read ({error.strerror})"
        raise AttnEditError(field, source, fix) from error
    if is_folder:
        if not (path / CONFIG_NAME).is_file():
            raise AttnEditError(field, path, f"give a folder that holds a {CONFIG_NAME}")
        return path / CONFIG_NAME
    if exists:
        return path
    if not _HUB_ID.fullmatch(str(source)):
        raise AttnEditError(field, source, f"give an existing folder or {CONFIG_NAME}, or a hub id")
    try:
        return Path(hf_hub_download(str(source), CONFIG_NAME))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        fix = f"give an existing folder, or a hub id that can be reached ({type(error).__name__})"
        raise AttnEditError(field, source, fix) from error
