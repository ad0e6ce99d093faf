"""One of the systems that a serving benchmark compares: a part of the schema of its YAML file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from benchmarks.serving.workload import Positive
from benchmarks.strict_model import StrictModel
from vllm_attnedit.edit.patterns import EditPlan
from vllm_attnedit.errors import AttnEditError


class System(StrictModel):
    """One of the things compared.

    Attributes:
        name: in tables; the first system is the control.
        edit: ``full`` is the teacher in stock vLLM.
        window_backend: ``stock`` serves window layers by vLLM's own attention, gate outside.
        window_pages: ``packed`` or ``separate`` pages of window layers; ``auto`` is the default.
        gate: of edited layers; a choice of the edit, as are the two that follow.
        full_layers: of GateSWA, instead of its default ones.
        qk_nope_head_dim: of MLA, likewise.
        fast_prefill: whether prompts skip the layers above GateSWA's last full one.
        tensor_parallel: devices that one copy of the model is split over, all of ``server.devices``
            by default. With fewer, as many copies as fill them share the requests out.
        arguments: further ones for ``vllm serve``; what must be equal everywhere is refused.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    edit: Literal["full", "gateswa", "mla"]
    window_backend: Literal["auto", "stock"] = "auto"
    window_pages: Literal["auto", "separate", "packed"] = "auto"
    gate: Literal["headwise", "elementwise", "none"] | None = None
    full_layers: tuple[int, ...] | None = None
    qk_nope_head_dim: Positive | None = None
    fast_prefill: bool = False
    tensor_parallel: Positive | None = None
    arguments: tuple[str, ...] = ()

    @property
    def choices(self) -> dict[str, Any]:
        """What is chosen of the edit, as :class:`vllm_attnedit.edit.patterns.EditPlan` has it."""
        names = ("gate", "full_layers", "qk_nope_head_dim")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @model_validator(mode="after")
    def _fits(self) -> System:
        if self.edit == "full":
            if self.choices:
                raise ValueError(f"edit: full has no {next(iter(self.choices))} to choose")
            return self
        try:
            EditPlan(target=self.edit, **self.choices)
        except AttnEditError as error:
            raise ValueError(str(error)) from error
        return self
