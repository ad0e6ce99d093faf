"""``python -m training COMMAND CONFIG [--key value ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from training.options import describe_options, load_config
from vllm_attnedit.errors import AttnEditError

# command: (what it does, module and function). Imported only when it runs: torch takes seconds.
COMMANDS = {
    "tokenize": ("tokenise the sources into data.shards", "training.commands:tokenize"),
    "stage1": ("layer-wise teacher forcing", "training.commands:stage1"),
    "stage2": ("model-level distillation", "training.commands:stage2"),
    "export": ("write the model of the newest checkpoint", "training.commands:export_newest"),
    "repack": ("rewrite the newest checkpoint in small files", "training.commands:repack_newest"),
    "evaluate": (
        "measure teacher, student and baselines side by side",
        "training.commands:evaluate",
    ),
    "generate": ("let the teacher write training text (needs vLLM)", "training.commands:generate"),
    "choose-layers": ("find the layers that should stay full", "training.commands:choose_layers"),
}


def _quieten() -> None:
    """One progress line is enough: no bars of the libraries below."""
    import_module("transformers.utils.logging").disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; bad input is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Progressive distillation of models with edited attention.",
        epilog="Any option of the configuration can follow it as --dotted.name value; "
        "`python -m training options` lists them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (meaning, _) in COMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.add_argument("config", metavar="CONFIG", help="YAML file; see training/configs")
    commands.add_parser("options", help="list every option of the configuration")
    chosen, overrides = parser.parse_known_args(arguments)
    if chosen.command == "options":
        for name, default, meaning in describe_options():
            print(f"{name} (default: {default})\n    {meaning}")
        return
    try:
        config = load_config(chosen.config, overrides)
        _quieten()
        module, _, function = COMMANDS[chosen.command][1].partition(":")
        command_function: Callable[..., None] = getattr(import_module(module), function)
        command_function(config)
    except AttnEditError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
