"""A worker process in which Triton interprets kernels on the CPU.

Triton decides at import whether it compiles or interprets, and the process of the tests may have
imported it already. The interpreter multiplies bfloat16 by its bit patterns, so that kernels are
held to their oracles in float16 and float32 here, in bfloat16 on a GPU (``tests/gpu/ops``).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """``interpreted(function, *arguments)``: the function's result in the worker."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_interpret) as worker:
        yield lambda function, *arguments: worker.submit(function, *arguments).result(timeout=120)
