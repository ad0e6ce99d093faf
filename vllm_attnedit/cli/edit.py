"""``attnedit edit``: a teacher becomes an edited checkpoint."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vllm_attnedit.cli.edit_report import print_report
from vllm_attnedit.cli.given import refuse_others
from vllm_attnedit.cli.quantities import format_bytes
from vllm_attnedit.edit import (
    Calibration,
    EditPlan,
    apply_edit,
    compact_edit,
    edit_checkpoint,
    parse_full_layers,
    save_edit,
)
from vllm_attnedit.edit.calibration import DEFAULT_TOKENS
from vllm_attnedit.errors import AttnEditError


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text}: give an integer") from None


BUILTIN, NONE = "builtin", "none"
_INTEGER: dict[str, Any] = {"parser": _integer, "metavar": "INTEGER"}
_DIM = "MLA: {}; by default {}."


def command(
    context: typer.Context,
    teacher: Annotated[
        str,
        typer.Argument(help="Model folder, hub id or .gguf file (--save-edit: edited folder)."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make; with --save-edit a file.")],
    target: Annotated[str | None, typer.Option(help="gateswa or mla.")] = None,
    init: Annotated[
        str, typer.Option(help="inherit the teacher's attention, or random as in the paper.")
    ] = "inherit",
    window: Annotated[
        int | None,
        typer.Option(**_INTEGER, help="GateSWA: tokens a window layer sees; by default 128."),
    ] = None,
    full_layers: Annotated[
        str | None,
        typer.Option(help="GateSWA: full-attention layers, such as 5,11,17; by default every 6th."),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(help="headwise, elementwise or none; by default headwise, for MLA none."),
    ] = None,
    kv_lora_rank: Annotated[
        int | None,
        typer.Option(
            **_INTEGER,
            help=_DIM.format("width of the cached latent", "half of K and V, at most 4 heads"),
        ),
    ] = None,
    qk_rope_head_dim: Annotated[
        int | None,
        typer.Option(**_INTEGER, help=_DIM.format("width of the RoPE key", "64, or the head's")),
    ] = None,
    qk_nope_head_dim: Annotated[
        int | None,
        typer.Option(**_INTEGER, help=_DIM.format("head width without position", "the teacher's")),
    ] = None,
    v_head_dim: Annotated[
        int | None,
        typer.Option(**_INTEGER, help=_DIM.format("head width of values", "the teacher's, alone")),
    ] = None,
    q_lora_rank: Annotated[
        int | None,
        typer.Option(**_INTEGER, help=_DIM.format("rank of the query projection", "full")),
    ] = None,
    qk_norm: Annotated[
        str | None,
        typer.Option(help=_DIM.format("per_head keeps the teacher's QK-norm", "the latent's norm")),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="MLA with inherit: text file the teacher is run on to see which inputs matter; "
            "by default builtin, Python's own documentation; none looks at weights only (faster, "
            "much worse)."
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(**_INTEGER, help=f"Of that text; by default {DEFAULT_TOKENS}.")
    ] = None,
    calibration_device: Annotated[
        str, typer.Option(help="Where the teacher runs on that text: cpu, cuda, npu.")
    ] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32; by default as stored, bfloat16 for GGUF."),
    ] = None,
    seed: Annotated[int, typer.Option(**_INTEGER, help="Of random weights.")] = 0,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub repository.")
    ] = None,
    from_edit: Annotated[
        Path | None, typer.Option(help="Apply this saved edit to its teacher instead.")
    ] = None,
    only_save_edit: Annotated[
        bool, typer.Option("--save-edit", help="Write the edit of an edited folder into a file.")
    ] = False,
    compact: Annotated[
        Path | None,
        typer.Option(
            "--compact-edit",
            help="Write this saved GateSWA edit as int8 differences from the teacher's attention: "
            "half the size.",
        ),
    ] = None,
) -> None:
    """Replace a teacher's attention by GateSWA or MLA, layer by layer.

    The output appears when it is complete; on failure nothing is left. Memory stays near one file
    of the teacher plus one layer. A saved edit holds the attention alone and needs its teacher
    again.
    """
    console = Console(highlight=False, soft_wrap=True)
    chosen = [
        option
        for option, given in (
            ("--save-edit", only_save_edit),
            ("--from-edit", from_edit is not None),
            ("--compact-edit", compact is not None),
        )
        if given
    ]
    if chosen:
        refuse_others(context, chosen[0], () if only_save_edit else ("--revision",))
        with _ending_on_sigterm():
            if compact is not None:
                nbytes = compact_edit(teacher, compact, out, revision=revision)
                said = f"{compact.name} as int8 differences, {format_bytes(nbytes)}"
            elif from_edit is not None:
                with _bar() as bar:
                    apply_edit(teacher, from_edit, out, revision=revision, progress=_shown_on(bar))
                said = f"{from_edit.name} applied to {teacher}"
            else:
                said = f"the edit alone, {format_bytes(save_edit(teacher, out))}"
        console.print(f"{out}: {said}")
        return
    if target is None:
        raise AttnEditError("--target", "missing", "use gateswa or mla")
    plan = EditPlan(
        target=target,
        init=init,
        window=window,
        full_layers=None if full_layers is None else parse_full_layers(full_layers),
        gate=gate,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        qk_nope_head_dim=qk_nope_head_dim,
        v_head_dim=v_head_dim,
        q_lora_rank=q_lora_rank,
        qk_norm=qk_norm,
        dtype=dtype,
        seed=seed,
    )
    text = _calibration(plan, calibration, calibration_tokens, calibration_device)
    with _ending_on_sigterm(), _bar() as bar:
        report = edit_checkpoint(
            teacher, out, plan, calibration=text, revision=revision, progress=_shown_on(bar)
        )
    print_report(report, console)


def _calibration(
    plan: EditPlan, source: str | None, tokens: int | None, device: str
) -> Calibration | None:
    if plan.target != "mla" or plan.init != "inherit":
        for option, value in (("--calibration", source), ("--calibration-tokens", tokens)):
            if value is not None:
                fix = "leave it out: only --target mla with --init inherit looks at text"
                raise AttnEditError(option, value, fix)
        return None
    if source == NONE:
        if tokens is not None:
            raise AttnEditError("--calibration-tokens", tokens, "leave it out: there is no text")
        return None
    count = DEFAULT_TOKENS if tokens is None else tokens
    if source in (None, BUILTIN):
        return Calibration.builtin(count, device)
    return Calibration.from_file(Path(str(source)), count, device)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C, so that the partial output is removed."""

    def end(_number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bar() -> Progress:
    # On stderr and gone at the end: stdout carries the result, stderr at most one line of error.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _shown_on(bar: Progress) -> Callable[[str, int, int], None]:
    task = bar.add_task("reading the teacher", total=None)

    def show(step: str, done: int, total: int) -> None:
        bar.update(task, description=step, completed=done, total=total)

    return show
