"""The real teacher as it is read, and how near to it an MLA edit starts."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_attnedit  # noqa: F401  registers the edited model
from tests.e2e.conftest import attnedit
from vllm_attnedit.edit.gguf_store import GgufStore

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def plain(teacher: Path) -> Any:
    """The teacher as transformers reads it from its GGUF file, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        teacher.parent, gguf_file=teacher.name, dtype=torch.float32
    )
    return model.eval()


def test_every_tensor_is_what_transformers_reads(plain: Any, teacher: Path) -> None:
    store = GgufStore(teacher)
    state = {k: v for k, v in plain.state_dict().items() if k != "lm_head.weight"}  # tied
    assert store.config.tie_word_embeddings
    assert store.tensors.keys() == state.keys()
    for name, expected in state.items():
        assert torch.equal(store.load(name), expected), name


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    result: Tensor = model(ids).logits.log_softmax(-1)
    return result


def test_inherited_mla_starts_near_the_teacher_and_random_far(
    plain: Any, teacher: Path, mla: Path, tmp_path: Path
) -> None:
    done = attnedit("edit", teacher, tmp_path / "random", "--target", "mla", "--init", "random")
    assert done.returncode == 0, done.stderr
    # English and code that the edit was not calibrated on.
    text = inspect.cleandoc(str(json.__doc__)) + inspect.getsource(json.JSONEncoder)
    ids = AutoTokenizer.from_pretrained(mla)(text, return_tensors="pt").input_ids[:, :512]
    reference = log_probabilities(plain, ids)
    divergence = {}
    for name, folder in (("inherit", mla), ("random", tmp_path / "random")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = log_probabilities(model, ids)
        divergence[name] = float((reference.exp() * (reference - found)).sum(-1).mean())
    assert divergence["inherit"] < 0.5, divergence
    assert divergence["random"] > 4, divergence
    kept = json.loads((mla / "config.json").read_text())["provenance"]["energy_kept"]
    assert min(kept["key"], kept["value"]) > 0.95
