"""``attnedit``: the command line. Bad input is one line on stderr and exit code 2, never a
traceback.

A command is imported when it is called, so that ``attnedit --help`` is as fast as Python itself.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import vllm_attnedit
from vllm_attnedit.errors import AttnEditError

# Each is a module of this package with a function `command`.
COMMANDS = {
    "edit": "Replace a teacher's attention by GateSWA or MLA.",
    "inspect": "Show the layers, sizes and origin of an edited checkpoint.",
    "kv": "Show the KV memory of a model against its teacher's.",
    "verify": "Compare a checkpoint in the reference model and in vLLM.",
    "doctor": "Check this installation and say how to mend it.",
}
# typer keeps a copy of click to itself; of its exceptions only subclasses of this one are public.
_CLICK_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class _LazyCommand(TyperCommand):
    """Stands for a command in the overview; becomes it when it is called."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        module = import_module(f"vllm_attnedit.cli.{self.name}")
        app = typer.Typer(add_completion=False)
        app.command(self.name)(module.command)
        return typer.main.get_command(app).make_context(info_name, args, *rest, **extra)


class _LazyGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attnedit {vllm_attnedit.__version__}")
        raise typer.Exit


def _overview(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Edit a model's attention to GateSWA or MLA, and look at what was made."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _build() -> Any:
    app = typer.Typer(cls=_LazyGroup, add_completion=False, invoke_without_command=True)
    app.callback()(_overview)
    group: Any = typer.main.get_command(app)
    for name, summary in COMMANDS.items():
        group.commands[name] = _LazyCommand(name, help=summary)
    return group


def _say(message: object) -> None:
    print("attnedit: " + " ".join(str(message).split()), file=sys.stderr)


def main() -> None:
    """Entry point of ``attnedit``: runs ``sys.argv`` and exits.

    Exit codes: 0 done, 1 what the command found is bad, 2 bad input, 130 interrupted.
    """
    try:
        code = _build().main(args=sys.argv[1:], prog_name="attnedit", standalone_mode=False)
    except AttnEditError as error:
        _say(error)
        sys.exit(2)
    except _CLICK_ERROR as error:
        _say(f"{error.format_message()} See 'attnedit --help'.")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
