from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.training.small import make_pair, write_text


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in a fixed order, and no fight over two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama and its GateSWA edit."""
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def latent_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Qwen3 and its MLA edit."""
    return make_pair(tmp_path_factory.mktemp("latent"), "qwen3", "mla")
