"""Times of kernels by replays of CUDA graphs.

A graph holds many launches, so that the cost of starting it disappears; launches rotate among input
sets that together exceed the L2 cache several times, so that each finds its bytes in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

#: Input sets of a case hold at least this many times the L2 cache.
L2_MULTIPLE = 4
#: Device time of one graph, about.
GRAPH_US = 1500.0
MIN_CALLS, MAX_CALLS = 4, 64

Call = Callable[[], object]


def rotation(bytes_per_call: int) -> int:
    """How many input sets a case with this traffic needs."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MAX_CALLS, math.ceil(L2_MULTIPLE * l2 / bytes_per_call)))


class Replay:
    """Calls, one for each input set, captured in a graph."""

    def __init__(self, calls: Sequence[Call], expected_us: float) -> None:
        wanted = max(MIN_CALLS, min(MAX_CALLS, round(GRAPH_US / expected_us)))
        repeats = math.ceil(wanted / len(calls))
        self.launches = repeats * len(calls)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(repeats):
                for call in calls:
                    call()
        self.graph.replay()
        torch.cuda.synchronize()

    def times(self, replays: int) -> list[float]:
        """Microseconds a call, one value for each replay."""
        measured = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            measured.append(start.elapsed_time(end) * 1e3 / self.launches)
        return measured


def compare(replays: dict[str, Replay], rounds: int, per_round: int) -> dict[str, list[float]]:
    """Times of several contestants, taken in turns so that a drift of clocks meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name, replay in replays.items():
            times[name] += replay.times(per_round)
    return times
