"""The benchmark of the block managers at its smallest."""

from __future__ import annotations

import pytest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash

from benchmarks.serving.block_managers import rows
from vllm_attnedit.kv_cache.spec import register_spec


def test_every_form_is_measured_against_vllms():
    register_spec()
    init_none_hash(sha256)
    table = rows(num_requests=2, steps=3)
    assert len({row["case"] for row in table}) == len(table) == 4
    for row in table:
        assert row["value"] > 0
        assert row["ratio"] == pytest.approx(row["value"] / row["control_value"], rel=0.05)
