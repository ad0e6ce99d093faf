"""Where each system's model comes from: dimensions alone, the small real model, or the user's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.models import TEACHERS, write_model, write_tokenizer
from benchmarks.serving.options import Options, Server
from benchmarks.serving.spread import spread_of
from benchmarks.serving.system import System
from examples.quickstart.teacher import CACHE, fetch_teacher
from vllm_attnedit.accounting import check_tp
from vllm_attnedit.checkpoint import load_config, read_json
from vllm_attnedit.edit.patterns import option_name
from vllm_attnedit.errors import AttnEditError

SMALL = "smollm2"


def prepare(options: Options, system: System, folder: Path) -> Path:
    """A checkpoint folder for ``system``, written below ``folder`` if need be.

    Raises:
        AttnEditError: for a model that is not known or not there.
    """
    if isinstance(options.model, dict):
        path = options.model[system.name]
        if not (path / "config.json").is_file():
            raise AttnEditError(f"model.{system.name}", path, "give a checkpoint folder")
        return path
    chosen = "".join(f"-{_word(value)}" for value in system.choices.values())
    out = folder / f"{options.model}-{system.edit}{chosen}-{options.window}"
    if (out / "config.json").is_file():
        return out
    if options.model == SMALL:
        return _edit_small(system, options.window, out)
    if options.model not in TEACHERS:
        known = ", ".join([*TEACHERS, SMALL])
        raise AttnEditError("model", options.model, f"use {known}, or a folder for each system")
    write_model(options.model, system.edit, out, options.window, **system.choices)
    write_tokenizer(out, TEACHERS[options.model]["vocab_size"])
    return out


def is_dummy(options: Options) -> bool:
    """Whether weights are to be made up by the server: their values change no speed."""
    return isinstance(options.model, str) and options.model in TEACHERS


def check_spread(folder: Path, system: System, server: Server) -> None:
    """Refuse a split that the model's heads do not allow, before a server is started for it.

    Raises:
        AttnEditError: naming the system's field.
    """
    tensor = spread_of(system, server).tensor
    if tensor == 1:
        return
    try:
        check_tp(load_config(folder), tensor)
    except AttnEditError as error:
        field = f"systems.{system.name}.tensor_parallel"
        raise AttnEditError(field, tensor, error.fix) from error


def describe(folder: Path, name: str, max_model_len: int) -> dict[str, Any]:
    """What the load generator must know of a model."""
    config = read_json(folder / "config.json")
    return {"name": name, "vocab_size": config["vocab_size"], "max_model_len": max_model_len}


def _word(choice: Any, separator: str = ".") -> str:
    return separator.join(map(str, choice)) if isinstance(choice, tuple) else str(choice)


def _edit_small(system: System, window: int, out: Path) -> Path:
    gguf = fetch_teacher(CACHE)
    if system.edit == "full":
        _export_teacher(gguf, out)
        return out
    command = [str(Path(sys.executable).with_name("attnedit")), "edit", str(gguf), str(out)]
    command += ["--target", system.edit, "--init", "inherit"]
    if system.edit == "gateswa":
        command += ["--window", str(window)]
    for name, value in system.choices.items():
        command += [option_name(name), _word(value, ",")]
    out.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AttnEditError("model", SMALL, f"attnedit edit failed: {done.stderr.strip()}")
    return out


def _export_teacher(gguf: Path, out: Path) -> None:
    """The GGUF file's model as a checkpoint folder, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    model.hf_quantizer, model.is_quantized = None, False
    part = out.with_name(out.name + ".part")
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
    config = read_json(part / "config.json")
    config.pop("quantization_config", None)
    (part / "config.json").write_text(json.dumps(config, indent=2))
    part.rename(out)
