"""Opens a teacher: a folder, a hub id or a GGUF file, all behind one small interface."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, GenerationConfig

from vllm_attnedit.checkpoint import CONFIG_NAME, load_config, read_json
from vllm_attnedit.config import FULL, MODEL_TYPE
from vllm_attnedit.edit.store import SafetensorsStore, TensorStore
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.families import get_family

# What makes a checkpoint usable beside its weights and config.json; copied as it is.
AUX_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
_HUB_PATTERNS = (CONFIG_NAME, "*.safetensors", "model.safetensors.index.json", *AUX_FILES)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model to edit, not loaded.

    Attributes:
        name: of the teacher, for provenance: a hub id, or the name of a folder or file.
        revision: commit of a hub repository, if known.
        config: its own transformers configuration, of a supported family.
        store: its weights.
        copy_files: writes tokenizer, chat template and generation config into a folder.
        load_tokenizer: its tokenizer.
    """

    name: str
    revision: str | None
    config: Any
    store: TensorStore
    copy_files: Callable[[Path], None]
    load_tokenizer: Callable[[], Any]


@contextmanager
def open_teacher(source: str | Path, revision: str | None = None) -> Iterator[Teacher]:
    """The teacher at ``source``: a folder, a ``.gguf`` file, or a hub id (or its local cache).

    Args:
        source: where it is.
        revision: branch, tag or commit of a hub repository.

    Raises:
        AttnEditError: if there is none, or it is none that can be edited.
    """
    path = Path(source)
    is_hub_id = not path.exists()
    if revision is not None and not is_hub_id:
        raise AttnEditError("--revision", revision, "leave it out: the teacher is a local path")
    if path.is_file():
        teacher = _open_gguf(path)
    elif is_hub_id:
        folder = _download(str(source), revision)
        commit = folder.name if folder.parent.name == "snapshots" else revision
        teacher = _open_folder(folder, str(source), commit)
    else:
        teacher = _open_folder(path, path.resolve().name, None)
    try:
        yield teacher
    finally:
        teacher.store.close()


def _load_tokenizer(name: str, folder: Path, **options: Any) -> Any:
    """Raises AttnEditError where transformers has an error of its own for each way to be broken."""
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        fix = f"give a teacher with a tokenizer that transformers reads ({reason[0][:120]})"
        raise AttnEditError("tokenizer", name, fix) from error


def _open_folder(folder: Path, name: str, revision: str | None) -> Teacher:
    def load_tokenizer() -> Any:
        return _load_tokenizer(name, folder)

    config = read_config(folder)
    return Teacher(
        name=name,
        revision=revision,
        config=config,
        store=SafetensorsStore(folder),
        copy_files=lambda target: copy_aux_files(folder, target),
        load_tokenizer=load_tokenizer,
    )


def copy_aux_files(folder: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and licences as they are."""
    for pattern in AUX_FILES:
        for file in sorted(folder.glob(pattern)):
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def _open_gguf(path: Path) -> Teacher:
    if path.suffix != ".gguf":
        fix = "give a folder, a hub id or a .gguf file"
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            fix = "convert it to safetensors: a pickle can run any code while it loads"
        raise AttnEditError("TEACHER", path, fix)
    # Here and not above: it needs the gguf package, which is slow to import.
    from vllm_attnedit.edit.gguf_store import GgufStore

    store = GgufStore(path)

    def load_tokenizer() -> Any:
        return _load_tokenizer(path.name, path.parent, gguf_file=path.name)

    def write_files(target: Path) -> None:
        load_tokenizer().save_pretrained(target)
        GenerationConfig.from_model_config(store.config).save_pretrained(target)

    check_editable(store.config.to_dict())
    return Teacher(
        name=path.name,
        revision=None,
        config=store.config,
        store=store,
        copy_files=write_files,
        load_tokenizer=load_tokenizer,
    )


def _download(repo_id: str, revision: str | None) -> Path:
    fix = "give an existing folder or .gguf file, or a hub id such as Qwen/Qwen3-8B"
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise AttnEditError("TEACHER", repo_id, f"no such file or folder; {fix}")
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=list(_HUB_PATTERNS))
        )
    except HFValidationError as error:
        raise AttnEditError("TEACHER", repo_id, f"no such file or folder; {fix}") from error
    except LocalEntryNotFoundError as error:
        fix = "check the id, the network and HF_HUB_OFFLINE: it is not in the local cache either"
        raise AttnEditError("TEACHER", repo_id, fix) from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        fix = f"check the id and --revision, and log in for a gated model ({reason})"
        raise AttnEditError("TEACHER", repo_id, fix) from error


def read_config(folder: Path) -> Any:
    """The configuration of a teacher folder, of its family's own class.

    Raises:
        AttnEditError: if it is missing, unreadable, of an unsupported family, or not editable.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        fix = f"give a model folder with a {CONFIG_NAME}, a hub id or a .gguf file"
        raise AttnEditError("TEACHER", folder, f"no {CONFIG_NAME} there; {fix}")
    check_editable(read_json(file))
    return load_config(file)


def check_editable(values: dict[str, Any]) -> None:
    """Refuse what cannot be edited, from the fields of a ``config.json``.

    Raises:
        AttnEditError: naming the field.
    """
    model_type = values.get("model_type")
    if model_type == MODEL_TYPE:
        fix = "give the unedited teacher: this checkpoint has been edited already"
        raise AttnEditError("model_type", model_type, fix)
    get_family(model_type, "model_type")
    architectures = values.get("architectures") or []
    if architectures and not any(str(a).endswith("ForCausalLM") for a in architectures):
        raise AttnEditError(
            "architectures", architectures, "use a causal language model (...ForCausalLM)"
        )
    if values.get("quantization_config"):
        stated = values["quantization_config"]
        method = stated.get("quant_method", "quantised") if isinstance(stated, dict) else stated
        raise AttnEditError("quantization_config", method, "use the unquantised checkpoint")
    if values.get("use_sliding_window"):
        fix = "use a teacher with full attention in every layer: windows are what the edit adds"
        raise AttnEditError("use_sliding_window", True, fix)
    if any(t != FULL for t in values.get("layer_types") or []):
        fix = "use a teacher with full attention in every layer: windows are what the edit adds"
        raise AttnEditError("layer_types", sorted(set(values["layer_types"])), fix)
