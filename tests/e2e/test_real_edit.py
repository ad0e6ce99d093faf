"""The edit of the real model: what it is at the start, and that the engine computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import vllm_attnedit  # noqa: F401  registers the edited model
from tests.e2e.conftest import attnedit, edit
from vllm_attnedit.config import SLIDING

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TEXT = (
    "Large language models keep the keys and values of every token they have seen. "
    "Most attention layers look at the recent past only, so most of that memory is never read. "
) * 14  # about 450 tokens: several windows


@pytest.fixture(scope="module")
def plain(teacher: Path):
    """The teacher as transformers reads it from its GGUF file, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        teacher.parent, gguf_file=teacher.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def ids(gateswa: Path) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(gateswa)(TEXT, return_tensors="pt")["input_ids"]


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def windowed_logits(model, ids: torch.Tensor, window: int, layer_types: list[str]) -> torch.Tensor:
    """The unedited teacher with window masks put into its layers by hand."""
    length = ids.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    visible = {False: distance >= 0, True: (distance >= 0) & (distance < window)}
    blocked = torch.finfo(torch.float32).min
    masks = {k: torch.where(v, 0.0, blocked)[None, None] for k, v in visible.items()}
    hooks = []
    for layer, layer_type in zip(model.model.layers, layer_types, strict=True):
        mask = masks[layer_type == SLIDING]

        def use(module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(use, with_kwargs=True))
    try:
        return model(ids).logits
    finally:
        for hook in hooks:
            hook.remove()


def test_inherit_is_the_teacher_restricted_to_its_windows(plain, gateswa: Path, ids: torch.Tensor):
    edited = load(gateswa)
    types = edited.config.layer_types
    assert types.count(SLIDING) == 25
    expected = windowed_logits(plain, ids, 128, types)
    with torch.no_grad():
        actual = edited(ids).logits
        unedited = plain(ids).logits
    assert (actual - expected).abs().max() <= 1e-4
    assert (actual - unedited).abs().max() > 1  # the windows do restrict


def test_a_wide_window_is_the_unedited_teacher(plain, teacher: Path, ids, tmp_path: Path):
    out = edit(
        teacher, tmp_path / "wide", "--target", "gateswa", "--dtype", "float32", "--window", "512"
    )
    with torch.no_grad():
        assert (load(out)(ids).logits - plain(ids).logits).abs().max() <= 1e-4


def test_the_reference_caches_its_windows_only(gateswa: Path, ids: torch.Tensor):
    model = load(gateswa)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    kept = {layer.keys.shape[-2] for layer in cache.layers}
    assert kept == {127, ids.shape[1]}


@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_verify_finds_the_engine_equal(target: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(target)
    done = attnedit("verify", folder, "--json", "--tokens", "32")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report
