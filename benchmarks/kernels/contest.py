"""A case of the benchmark: an operator, its inputs, and what else computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.kernels.timing import Call

OURS = "ours"


@dataclass
class Contest:
    """What is launched for a case, built on the device.

    Attributes:
        traffic: bytes that must move: each input read once, each output written once.
        operations: floating-point operations that must be done.
        calls: by contestant, one call for each input set, each returning its output. :data:`OURS`
            is one of them; others must agree with it.
        notes: by contestant that could not be built, why.
    """

    traffic: int
    operations: int
    calls: dict[str, list[Call]]
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A named case; ``build`` allocates its inputs."""

    name: str
    build: Callable[[], Contest]
    #: Part of ``--quick``.
    quick: bool = False

    @property
    def operator(self) -> str:
        return self.name.split()[0]
