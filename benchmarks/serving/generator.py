"""One load-generating process: which requests are its own, what they brought, and its own cost."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gevent
import httpx
from gevent.event import Event

from benchmarks.serving.plan import Plan
from benchmarks.serving.records import ClientCost, Record, write_records
from vllm_attnedit.errors import AttnEditError

_BEAT_S = 0.01
_SETTLE_S = 0.3


class Generator:
    """State of a process while a level runs.

    Args:
        plan: the workload's requests.
        model_name: as the server calls the model.
        index, processes: which of how many processes this is.
    """

    def __init__(self, plan: Plan, model_name: str, index: int, processes: int) -> None:
        self.plan, self.model_name = plan, model_name
        self.index, self.processes = index, processes
        self.records: list[Record] = []
        self._open: dict[int, Record] = {}
        self._started_users = self._ready_users = self._done_users = self._conversations = 0
        self._go = Event()
        self._lags = array("f")
        self._stream_beats = 0
        self._started = time.monotonic()
        self._cpu = time.process_time()
        self._beating = gevent.spawn(self._beat)

    def is_first_user(self) -> bool:
        """Note that a user came; whether it is the first one of this process."""
        self._started_users += 1
        return self._started_users == 1

    def all_ready(self) -> None:
        """Wait until every user of this process has its request at hand: a burst starts at once.

        How many users a process gets is locust's to decide: all are here once none came for a
        while.
        """
        self._ready_users += 1
        ready = self._ready_users
        gevent.sleep(_SETTLE_S)
        if self._ready_users == ready:
            self._go.set()
        self._go.wait()

    def user_is_done(self) -> bool:
        """Note that a user has asked all; whether it was the last one of this process."""
        self._done_users += 1
        if self.plan.workload.load != "burst":
            return self._done_users == 1
        return self._done_users == self._started_users

    def numbers(self) -> Iterator[int]:
        """What one user asks: always the next conversation that nobody has had, turn by turn.

        No number comes twice, also if users come and go meanwhile.
        """
        turns = self.plan.workload.turns
        while True:
            conversation = self._conversations * self.processes + self.index
            self._conversations += 1
            yield from range(conversation * turns, (conversation + 1) * turns)

    def arrivals(self) -> Iterator[tuple[int, float]]:
        """This process's requests of an open load: number and seconds after the start."""
        times = self.plan.arrivals(self.plan.workload.levels[0])
        for number in range(self.index, len(times), self.processes):
            yield number, float(times[number])

    @contextmanager
    def streaming(self, record: Record) -> Iterator[None]:
        """Keep the record, also if the stream is cut off."""
        self._open[id(record)] = record
        try:
            yield
        finally:
            del self._open[id(record)]
            self.records.append(record)

    def close(self) -> None:
        """End what runs beside the users."""
        self._beating.kill()

    def write(self, path: Path) -> None:
        """All records and the cost of this process."""
        elapsed = max(1e-9, time.monotonic() - self._started)
        lags = sorted(self._lags) or [0.0]
        cost = ClientCost(
            cpu=(time.process_time() - self._cpu) / elapsed,
            lag_p99_s=lags[int(0.99 * (len(lags) - 1))],
            lag_max_s=lags[-1],
            streams=self._stream_beats / max(1, len(self._lags)),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, self.records, cost)

    def _beat(self) -> None:
        """What wakes late here would have timed a token late."""
        while True:
            due = time.monotonic() + _BEAT_S
            gevent.sleep(_BEAT_S)
            self._lags.append(max(0.0, time.monotonic() - due))
            self._stream_beats += len(self._open)


def describe_server(host: str, key: str) -> tuple[str, int]:
    """The served model's name and its longest request, from ``/v1/models``.

    Raises:
        AttnEditError: if the server does not say.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.get(f"{host.rstrip('/')}/v1/models", headers=headers, timeout=10)
        model = response.raise_for_status().json()["data"][0]
        return str(model["id"]), int(model.get("max_model_len") or 1 << 20)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        fix = f"give the address of an OpenAI-compatible server ({error})"
        raise AttnEditError("--host", host, fix) from error
