"""Parts of a bounded size give back what was written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.parts import PartsReader, write_parts
from vllm_attnedit.errors import AttnEditError


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3), min_size=1, max_size=6),
    limit=st.integers(8, 2000),
    kinds=st.lists(st.sampled_from(["float32", "bfloat16", "uint8"]), min_size=6, max_size=6),
)
def test_parts_give_back_what_was_written(tmp_path_factory, shapes, limit, kinds):
    folder = tmp_path_factory.mktemp("parts")
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": (100 * torch.rand(shape, generator=draw)).to(getattr(torch, kinds[i]))
        for i, shape in enumerate(shapes)
    }
    write_parts(folder, "w-0", tensors.items(), limit)
    reader = PartsReader(folder, "w-")
    assert list(reader) == list(tensors)
    for name, tensor in tensors.items():
        found = reader.load(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert reader.shape(name) == tuple(tensor.shape)


def test_no_file_exceeds_the_limit(tmp_path):
    limit = 1 << 20
    tensors = [(f"t{i}", torch.zeros(150_000 + i)) for i in range(7)]
    write_parts(tmp_path, "w-0", [*tensors, ("big", torch.arange(600_000.0))], limit)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert max(sizes) <= limit
    assert len(sizes) == 8
    assert torch.equal(PartsReader(tmp_path).load("big"), torch.arange(600_000.0))


def test_a_damaged_part_is_named(tmp_path):
    write_parts(tmp_path, "w-0", [("a", torch.ones(10))])
    (tmp_path / "w-0-000.safetensors").write_bytes(b"short")
    with pytest.raises(AttnEditError, match=r"w-0-000\.safetensors"):
        PartsReader(tmp_path).load("a")
