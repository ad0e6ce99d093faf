"""Options that were given, against those that apply."""

from __future__ import annotations

from collections.abc import Collection

import typer

from vllm_attnedit.errors import AttnEditError


def refuse_others(context: typer.Context, option: str, taken: Collection[str]) -> None:
    """Refuse options that would be ignored beside ``option``.

    Args:
        context: of the command.
        option: the one that decides what the command does.
        taken: further options that it looks at. Arguments without dashes may always be given.

    Raises:
        AttnEditError: for the first other one on the command line.
    """
    for parameter in context.command.params:
        name = parameter.opts[0]
        if not name.startswith("--") or name in (option, *taken) or parameter.name is None:
            continue
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name == "COMMANDLINE":
            value = context.params[parameter.name]
            raise AttnEditError(name, value, f"leave it out, or {option}")
