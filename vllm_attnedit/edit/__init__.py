"""Makes edited checkpoints: from a teacher and a plan, or from a teacher and a saved edit.

:func:`edit_checkpoint` is what ``attnedit edit`` calls. Everything streams: neither the teacher nor
the edited model is ever held in memory. Names are imported when they are used, so that plans and
headers can be had without torch's models.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_attnedit.edit.calibration import Calibration
    from vllm_attnedit.edit.convert import EditReport, edit_checkpoint
    from vllm_attnedit.edit.edits import apply_edit, compact_edit, save_edit
    from vllm_attnedit.edit.latent import EnergyKept
    from vllm_attnedit.edit.patterns import EditPlan, parse_full_layers

_MODULE_OF = {
    "Calibration": "calibration",
    "EditPlan": "patterns",
    "EditReport": "convert",
    "EnergyKept": "latent",
    "apply_edit": "edits",
    "compact_edit": "edits",
    "edit_checkpoint": "convert",
    "parse_full_layers": "patterns",
    "save_edit": "edits",
}

__all__ = [
    "Calibration",
    "EditPlan",
    "EditReport",
    "EnergyKept",
    "apply_edit",
    "compact_edit",
    "edit_checkpoint",
    "parse_full_layers",
    "save_edit",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
