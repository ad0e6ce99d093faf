from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.command import attnedit
from tests.unit.tiny import tiny_teacher

__all__ = ["attnedit", "teacher_of"]


@pytest.fixture(scope="session")
def teacher_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The tiny teacher of a family in several shards, made once; tests only read it."""
    made: dict[str, Path] = {}

    def get(family: str = "qwen3") -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / f"tiny-{family}"
            made[family] = tiny_teacher(family, folder, max_shard_size="700KB")
        return made[family]

    return get
