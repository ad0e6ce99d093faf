"""Where prompts may skip layers, and what is said where they may not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_attnedit.config import FULL, LATENT, SLIDING
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.layers.fast_prefill import OPTION, fast_prefill, reason_against
from vllm_attnedit.models.prompt_cut import whole

TYPES = (SLIDING, FULL, SLIDING, SLIDING)


def config(types: tuple[str, ...] = TYPES, **changes: Any) -> Any:
    parallel = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "use_ubatching": False}
    parallel |= {"decode_context_parallel_size": 1}
    model = SimpleNamespace(edit=SimpleNamespace(layer_types=types), num_hidden_layers=len(types))
    values: dict[str, Any] = {
        "additional_config": {OPTION: True},
        "parallel_config": SimpleNamespace(**(parallel | changes.pop("parallel", {}))),
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        "model_config": SimpleNamespace(
            hf_text_config=model, runner_type=changes.pop("runner", "generate")
        ),
    }
    return SimpleNamespace(**(values | changes))


def test_possible_where_windows_lie_above_the_last_full_layer() -> None:
    assert reason_against(config()) is None
    assert fast_prefill(config())
    assert fast_prefill(config(speculative_config=SimpleNamespace(method="ngram")))


@pytest.mark.parametrize("options", [None, {}, {OPTION: False}])
def test_off_unless_asked_for(options: dict[str, Any] | None) -> None:
    assert not fast_prefill(config(additional_config=options))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"types": (SLIDING, FULL)}, "no window layer"),
        ({"types": (LATENT, LATENT)}, "no window layer"),
        ({"types": (SLIDING, SLIDING)}, "no layer is full"),
        (
            {"additional_config": {OPTION: True, "attnedit_window_backend": "stock"}},
            "attnedit_window_backend",
        ),
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline"),
        ({"parallel": {"data_parallel_size": 2}}, "data parallelism"),
        ({"lora_config": object()}, "LoRA"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "eagle"),
        ({"runner": "pooling"}, "pooling"),
    ],
)
def test_not_possible(changes: dict[str, Any], reason: str) -> None:
    asked = config(**changes)
    assert reason in (reason_against(asked) or "")
    assert not fast_prefill(asked)


def test_the_option_is_true_or_false() -> None:
    with pytest.raises(AttnEditError, match=f"{OPTION}: yes: use true or false"):
        fast_prefill(config(additional_config={OPTION: "yes"}))


def test_what_was_not_computed_is_no_number() -> None:
    rows, values = torch.tensor([1, 3]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = whole(rows, values, 5)
    assert torch.equal(found[rows], values)
    assert found[[0, 2, 4]].isnan().all()
