"""What a system's choices make of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from benchmarks.serving.options import Options
from benchmarks.serving.system import System
from benchmarks.serving.systems import prepare
from vllm_attnedit.checkpoint import load_config

SERVER = {"max_model_len": 1024}
WORKLOADS = [{"name": "alone", "load": "burst", "levels": [1]}]


def options(*systems: dict[str, Any]) -> Options:
    data = {"name": "x", "model": "qwen3-8b", "systems": list(systems), "server": SERVER}
    return Options.model_validate({**data, "workloads": WORKLOADS})


def test_each_choice_is_in_the_model_and_in_its_folder(tmp_path: Path):
    all_of_them = options(
        {"name": "mla", "edit": "mla"},
        {"name": "narrow", "edit": "mla", "qk_nope_head_dim": 64},
        {"name": "early", "edit": "gateswa", "gate": "none", "full_layers": [0, 5]},
    )
    folders = [prepare(all_of_them, system, tmp_path) for system in all_of_them.systems]
    assert len(set(folders)) == 3
    mla, narrow, early = (load_config(folder).edit for folder in folders)
    assert (mla.qk_nope_head_dim, narrow.qk_nope_head_dim) == (128, 64)
    assert narrow.kv_lora_rank == mla.kv_lora_rank == 512
    assert [i for i, kind in enumerate(early.layer_types) if kind == "full_attention"] == [0, 5]
    assert early.gate is None


@pytest.mark.parametrize(
    ("edit", "choice", "says"),
    [
        ("full", {"gate": "headwise"}, "full has no gate"),
        ("gateswa", {"qk_nope_head_dim": 64}, "--qk-nope-head-dim: 64"),
        ("mla", {"full_layers": [0]}, "--full-layers"),
    ],
)
def test_what_an_edit_does_not_have_is_refused(edit: str, choice: dict[str, Any], says: str):
    with pytest.raises(ValidationError, match=says):
        System(name="x", edit=edit, **choice)  # type: ignore[arg-type]
