"""Safetensors written tensor by tensor are what the library reads."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_attnedit.edit.writer import PlannedTensor, ShardWriter, shard_names, write_index
from vllm_attnedit.errors import AttnEditError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    parts=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_any_order_of_any_tensors_reads_back(tmp_path_factory, parts, order):
    folder = tmp_path_factory.mktemp("writer")
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, (shape, dtype) in enumerate(parts)}
    planned = [PlannedTensor(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]
    writer = ShardWriter(folder / "a.safetensors", planned, {"note": "ä"})
    for name in order.sample(list(tensors), len(tensors)):
        writer.write(name, tensors[name])
    writer.close()
    found = load_file(folder / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    save_file(tensors, folder / "b.safetensors", metadata={"format": "pt", "note": "ä"})
    assert (folder / "a.safetensors").stat().st_size <= (
        folder / "b.safetensors"
    ).stat().st_size + 64


def writer_for(tmp_path, dtype: torch.dtype) -> ShardWriter:
    return ShardWriter(tmp_path / "x.safetensors", [PlannedTensor("x", (4,), dtype)])


def test_tensors_are_cast_as_torch_casts_them(tmp_path):
    values = torch.tensor([1.0, 1.00390625, -3.3333333, 1e-8])
    writer = writer_for(tmp_path, torch.bfloat16)
    writer.write("x", values.double())
    writer.close()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], values.to(torch.bfloat16))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_value_that_is_not_finite(tmp_path, value):
    writer = writer_for(tmp_path, torch.float32)
    with pytest.raises(AttnEditError, match=r"x: NaN or Inf"):
        writer.write("x", torch.tensor([1.0, value, -value, 2.0]))
    writer.abandon()


def test_large_finite_values_whose_sum_is_not_finite_pass(tmp_path):
    writer = writer_for(tmp_path, torch.float32)
    writer.write("x", torch.full((4,), 3e38))
    writer.close()
    assert load_file(tmp_path / "x.safetensors")["x"].max() == torch.tensor(3e38)


def test_overflow_of_the_asked_dtype_is_said(tmp_path):
    writer = writer_for(tmp_path, torch.float16)
    with pytest.raises(AttnEditError, match=r"--dtype: float16: use --dtype bfloat16: x has"):
        writer.write("x", torch.full((4,), 1e6))
    writer.abandon()


def test_forgetting_a_tensor_or_its_shape_is_an_error(tmp_path):
    writer = writer_for(tmp_path, torch.float32)
    with pytest.raises(ValueError, match="planned as"):
        writer.write("x", torch.zeros(5))
    with pytest.raises(ValueError, match="never written"):
        writer.close()
    writer.abandon()
    writer.abandon()


def test_index_of_several_shards_and_none_of_one(tmp_path):
    shards = [
        [PlannedTensor("a", (2, 2), torch.float32)],
        [PlannedTensor("b", (3,), torch.bfloat16)],
    ]
    write_index(tmp_path, shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {"metadata": {"total_size": 22}, "weight_map": {"a": first, "b": second}}
    assert shard_names(1) == ["model.safetensors"]
    (tmp_path / "single").mkdir()
    write_index(tmp_path / "single", shards[:1])
    assert list((tmp_path / "single").iterdir()) == []
