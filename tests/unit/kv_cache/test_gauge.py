"""The gauge of window blocks agrees with the pool, and is there only where it can be read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from tests.unit.kv_cache.model_engine import ModelEngine
from vllm_attnedit.kv_cache import gauge
from vllm_attnedit.kv_server import WINDOW_BLOCKS


def exported(group: int) -> float | None:
    labels = {"group": str(group), "block_size": "4", "heads": "1"}
    return REGISTRY.get_sample_value(WINDOW_BLOCKS, labels)


def test_without_a_folder_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    engine = ModelEngine(window=6)
    assert [m.gauge for m in engine.manager.coordinator.single_type_managers[1:]] == [None] * 2


def test_groups_add_up_to_the_pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(gauge, "PERIOD_S", 0.0)
    engine = ModelEngine(window=6)
    rng = random.Random(0)
    shared = [rng.randrange(50) for _ in range(20)]
    names = [engine.add([*shared, *(rng.randrange(50) for _ in range(5 * i))]) for i in range(4)]
    full, *windows = engine.manager.coordinator.single_type_managers
    for _ in range(12):
        engine.step(dict.fromkeys(names, rng.choice((1, 7, 16))), rng)
        engine.manager.new_step_starts()
        in_full = {b.block_id for blocks in full.req_to_blocks.values() for b in blocks}
        used = engine.baseline - engine.pool.get_num_free_blocks()
        assert [exported(1), exported(2)] == [gauge.count_blocks(m) for m in windows]
        assert len(in_full) + sum(gauge.count_blocks(m) for m in windows) == used
    for name in names:
        engine.finish(name)
    assert [exported(1), exported(2)] == [0, 0]


def test_between_two_updates_nothing_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    engine = ModelEngine(window=6)
    engine.add(list(range(30)))
    engine.step({"r0": 30}, random.Random(0))
    for manager in engine.manager.coordinator.single_type_managers[1:]:
        manager.gauge.due = 0.0
    engine.manager.new_step_starts()
    assert exported(1)
    counting = gauge.count_blocks
    monkeypatch.setattr(gauge, "count_blocks", lambda manager: pytest.fail("counted"))
    engine.manager.new_step_starts()
    monkeypatch.setattr(gauge, "count_blocks", counting)
    engine.finish("r0")  # the last one: no step will come to say that nothing is held
    assert exported(1) == 0
