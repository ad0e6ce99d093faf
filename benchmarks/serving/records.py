"""What the load generator saw of each request, in memory and as one file.

Times are seconds of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CUT = "cut off when the level ended"
"""The error of requests that were still streaming: no failure, and not a whole request either."""


@dataclass
class Record:
    """One request.

    Attributes:
        number: of the workload's plan.
        sent_s: when its first byte went out.
        late_s: how long after it was due that was (open loads; else 0).
        first_s, last_s: arrival of the first and the last token; 0 without any.
        end_s: arrival of the stream's end, or of the error.
        gaps_s: between one token's arrival and the next's.
        prompt_tokens, output_tokens: as the server counted them.
        error: what went wrong, else empty.
    """

    number: int
    sent_s: float = 0.0
    late_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    end_s: float = 0.0
    gaps_s: array[float] = field(default_factory=lambda: array("f"))
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_s - self.sent_s

    @property
    def whole(self) -> bool:
        """Whether the answer came to its end."""
        return not self.error

    @property
    def failed(self) -> bool:
        """Whether something went wrong."""
        return self.error not in ("", CUT)

    @property
    def latency_s(self) -> float:
        """To the last byte."""
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; ``None`` for a single one."""
        if self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.__dict__, "gaps_s": [round(gap, 6) for gap in self.gaps_s]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**data, "gaps_s": array("f", data["gaps_s"])})


@dataclass(frozen=True)
class ClientCost:
    """What the load generator itself took, of one process.

    Attributes:
        cpu: cores in use, mean.
        lag_p99_s, lag_max_s: how late its event loop woke from a sleep.
        streams: mean number of open streams.
    """

    cpu: float
    lag_p99_s: float
    lag_max_s: float
    streams: float


def write_records(path: Path, records: list[Record], cost: ClientCost) -> None:
    """One process's part; complete or not there at all."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(cost.__dict__) + "\n")
        for record in records:
            file.write(json.dumps(record.to_dict()) + "\n")
    part.rename(path)


def read_records(paths: list[Path]) -> tuple[list[Record], list[ClientCost]]:
    """All processes' parts, by time of sending."""
    records: list[Record] = []
    costs: list[ClientCost] = []
    for path in paths:
        with path.open(encoding="utf-8") as file:
            costs.append(ClientCost(**json.loads(next(file))))
            records += [Record.from_dict(json.loads(line)) for line in file]
    return sorted(records, key=lambda record: record.sent_s), costs
