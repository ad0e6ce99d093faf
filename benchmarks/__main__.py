"""``python -m benchmarks serving CONFIG.yaml``: one command, one report.

Bad input is one line on stderr and exit code 2; an interrupted run leaves a report of what it has
and exits with 128 plus the signal's number.
"""

from __future__ import annotations

import sys
from typing import Any

import typer

from benchmarks.scaling.cli import training_scaling
from benchmarks.serving.cli import profile, serving
from benchmarks.suite.cli import suite
from benchmarks.training.cli import training
from vllm_attnedit.errors import AttnEditError

_TRAINING_OPTIONS: Any = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Of commands that hand on what they do not know."""

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def _overview() -> None:
    """Benchmarks of this project; the kernels' are ``python -m benchmarks.kernels``."""


app.command()(serving)
app.command()(profile)
app.command("training-scaling", context_settings=_TRAINING_OPTIONS)(training_scaling)
app.command(context_settings=_TRAINING_OPTIONS)(training)
app.command()(suite)


def main() -> None:
    """Entry point."""
    try:
        app(prog_name="python -m benchmarks")
    except AttnEditError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
