"""What a decoder in two parts gives its captured graphs: tensors where they were at capture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode

from vllm_attnedit.models import stacks
from vllm_attnedit.models.stacks import Stacks

HIDDEN, MOST = 8, 16


class Part(nn.Module):
    """Stands for a captured part: notes where its inputs are, and adds to them."""

    def __init__(self, add: float) -> None:
        super().__init__()
        self.add = add
        self.seen: list[tuple[int, ...]] = []

    def forward(self, positions: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(tuple(x.data_ptr() for x in inputs))
        return inputs[0] + self.add, inputs[-1] - self.add


@pytest.fixture
def two_parts(monkeypatch: pytest.MonkeyPatch):
    """The module without an engine, and the mode of the step that runs."""
    module = Stacks.__new__(Stacks)
    nn.Module.__init__(module)
    module.lower, module.upper = Part(1.0), Part(10.0)  # type: ignore[assignment]
    module.ends = SimpleNamespace(of_this_step=lambda: None)  # type: ignore[assignment]
    module.register_buffer("entries", torch.full((3, MOST, HIDDEN), torch.nan))
    context = SimpleNamespace(cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE)
    monkeypatch.setattr(stacks, "get_forward_context", lambda: context)
    return module, context


@pytest.mark.parametrize("tokens", [1, 7, MOST])
def test_graphs_find_their_inputs_where_they_were_captured(two_parts, tokens: int):
    module, _ = two_parts
    kept = []  # so that no two steps' embeddings can be at one address
    for step in range(3):
        kept.append(torch.full((tokens, HIDDEN), float(step)))
        output, residual = module(torch.arange(tokens), kept[-1])
        assert torch.equal(output, kept[-1] + 11)
        assert torch.equal(residual, kept[-1] - 11)
    for part in (module.lower, module.upper):
        assert len(set(part.seen)) == 1
    (lower,), (upper,) = set(module.lower.seen), set(module.upper.seen)
    assert len({*lower, *upper}) == 3


def test_nothing_is_copied_without_graphs(two_parts):
    module, context = two_parts
    context.cudagraph_runtime_mode = CUDAGraphMode.NONE
    hidden = torch.ones(MOST + 1, HIDDEN)  # more than any graph takes
    output, _ = module(torch.arange(MOST + 1), hidden)
    assert torch.equal(output, hidden + 11)
    assert module.lower.seen == [(hidden.data_ptr(),)]
