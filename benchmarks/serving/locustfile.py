"""Load on an OpenAI-compatible streaming server, timed token by token.

    locust -f benchmarks/serving/locustfile.py --host http://localhost:8000

with locust's web UI, or ``--headless -u 16 -t 60s --csv out --html out.html``. Its tables show, in
milliseconds, end-to-end latency (``POST``, with output tokens as size), ``TTFT``, ``TPOT`` (time
per output token after the first) and ``ITL`` (between two tokens, at most 16 of each answer). The
number of users is the concurrency of a closed load. ``--records FOLDER`` keeps every request.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import gevent
from locust import User, constant, events, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from benchmarks.serving.generator import Generator, describe_server
from benchmarks.serving.plan import Ask, Plan
from benchmarks.serving.records import Record
from benchmarks.serving.streams import connect, run_stream
from benchmarks.serving.workload import Workload
from vllm_attnedit.errors import AttnEditError

_MOST_GAPS = 16
_LEAD_S = 0.3
"""Before an open load's first arrival, so that its first request is ready in time."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "--model-name": {"default": "", "help": "as the server calls it; asked from it by default"},
    "--kind": {"default": "random", "choices": ["random", "multi_turn", "trace", "sessions"]},
    "--api": {"default": "completions", "choices": ["completions", "chat"]},
    "--load": {"default": "closed", "choices": ["burst", "closed", "poisson", "trace"]},
    "--rate": {"type": float, "default": 1.0, "help": "requests a second, or a trace's speed-up"},
    "--requests": {"type": int, "default": 128, "help": "of an open load"},
    "--prompt-tokens": {"type": int, "default": 1024},
    "--output-tokens": {"type": int, "default": 256},
    "--prefix-tokens": {"type": int, "default": 0, "help": "shared by all conversations"},
    "--turns": {"type": int, "default": 1, "help": "of a conversation (kind multi_turn)"},
    "--trace": {"default": "", "help": "file of kind trace or sessions"},
    "--seed": {"type": int, "default": 0, "help": "of the prompts; 0 draws new ones for every run"},
    "--vocab-size": {"type": int, "default": 32_000, "help": "prompts are ids below it"},
    "--max-model-len": {"type": int, "default": 0, "help": "asked from the server by default"},
    "--records": {"default": "", "help": "folder for a file with every request"},
    "--api-key": {"default": "", "env_var": "OPENAI_API_KEY"},
}


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    for name, settings in _OPTIONS.items():
        parser.add_argument(name, include_in_web_ui=name != "--api-key", **settings)


def workload_of(options: Any, users: int) -> Workload:
    """The workload that the command line describes.

    Raises:
        AttnEditError: if its options do not fit together.
    """
    try:
        return Workload(
            name="locust",
            kind=options.kind,
            load=options.load,
            api=options.api,
            levels=(users if options.load in ("burst", "closed") else options.rate,),
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            requests=options.requests,
            prefix_tokens=options.prefix_tokens,
            turns=options.turns,
            path=Path(options.trace) if options.trace else None,
            seed=options.drawn_seed,
        )
    except ValueError as error:
        first = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
        raise AttnEditError("options", options.kind, first) from error


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    environment.generator = None  # type: ignore[attr-defined]
    if not isinstance(environment.runner, WorkerRunner):
        _draw_seed(environment.parsed_options)
    if isinstance(environment.runner, MasterRunner):
        environment.drained = set()  # type: ignore[attr-defined]
        return
    options: Any = environment.parsed_options
    users = max(1, environment.runner.target_user_count if environment.runner else 1)
    if isinstance(environment.runner, WorkerRunner) or options.num_users:
        users = options.num_users or users
    try:
        name, max_model_len = options.model_name, options.max_model_len
        if not (name and max_model_len):
            found = describe_server(environment.host or "", options.api_key)
            name, max_model_len = name or found[0], max_model_len or found[1]
        plan = Plan(workload_of(options, users), options.vocab_size, max_model_len)
    except AttnEditError as error:
        print(f"locustfile: {error}", flush=True)
        environment.process_exit_code = 2
        if (runner := environment.runner) is not None:
            gevent.spawn_later(0.1, runner.quit if options.headless else runner.stop)
        return
    index = getattr(environment.runner, "worker_index", 0) or 0
    processes = max(1, options.processes or 1, options.expect_workers or 1)
    environment.generator = Generator(plan, name, index, processes)  # type: ignore[attr-defined]


def _draw_seed(options: Any) -> None:
    """Seed 0 is another one in each run: servers cache prompts, and a second run would find them.

    Workers get the attribute with the others that they do not know from their own command line.
    """
    options.drawn_seed = options.seed or random.SystemRandom().randrange(1, 1 << 31)
    if not options.seed:
        print(f"locustfile: prompts of --seed {options.drawn_seed}", flush=True)


@events.test_stop.add_listener
def _stop(environment: Environment, **_: Any) -> None:
    generator: Generator | None = getattr(environment, "generator", None)
    options: Any = environment.parsed_options
    if generator is None:
        return
    generator.close()
    if options.records:
        gevent.sleep(0)  # users that were just killed note what they had
        generator.write(Path(options.records) / f"{os.getpid()}.jsonl")


@events.quitting.add_listener
def _quit(environment: Environment, **_: Any) -> None:
    """A headless run in which nothing was asked did not pass."""
    options: Any = environment.parsed_options
    if isinstance(environment.runner, WorkerRunner) or not options.headless:
        return
    if environment.process_exit_code is None and not environment.stats.total.num_requests:
        print("locustfile: no request was answered: is -t long enough?", flush=True)
        environment.process_exit_code = 1


@events.init.add_listener
def _listen(environment: Environment, **_: Any) -> None:
    if isinstance(environment.runner, MasterRunner):
        environment.runner.register_message("drained", _worker_drained)


def _worker_drained(environment: Environment, msg: Any, **_: Any) -> None:
    environment.drained.add(msg.node_id)  # type: ignore[attr-defined]
    runner = environment.runner
    if runner is not None and len(environment.drained) == runner.worker_count:  # type: ignore[attr-defined]
        runner.stop()  # workers report what they have; on quit alone they would not
        runner.quit()


class ApiUser(User):
    """One user of a closed or burst load; of an open load the first one sends all requests."""

    wait_time = constant(0)

    def on_start(self) -> None:
        generator: Generator | None = getattr(self.environment, "generator", None)
        if generator is None:
            gevent.sleep(1e9)  # _start said what is wrong and stops the run
            return
        self.generator = generator
        self.is_first = generator.is_first_user()
        self.numbers = generator.numbers()
        self.client = connect(self.environment.host or "")

    @task
    def work(self) -> None:
        """One request; of a burst the only one, of an open load all of this process."""
        plan, load = self.generator.plan, self.generator.plan.workload.load
        if load in ("burst", "closed"):
            number = next(self.numbers)
            ask = self._payload(plan.ask(number))
            if load == "burst":
                self.generator.all_ready()
            self._send(self.client, *ask, Record(number))
            if load == "closed":
                return
        elif self.is_first:
            self._send_arrivals()
        if self.generator.user_is_done():
            self._drained()
        gevent.sleep(1e9)  # until the runner stops

    def _send_arrivals(self) -> None:
        generator = self.generator
        idle: list[Any] = []
        started, asking = time.monotonic() + _LEAD_S, []
        for number, due_s in generator.arrivals():
            ask = self._payload(generator.plan.ask(number))  # built and connected before it is due
            client = idle.pop() if idle else connect(self.environment.host or "")
            gevent.sleep(max(0.0, started + due_s - time.monotonic()))
            record = Record(number, late_s=max(0.0, time.monotonic() - started - due_s))
            asking.append(gevent.spawn(self._lend, idle, client, ask, record))
        gevent.joinall(asking)

    def _lend(self, idle: list[Any], client: Any, ask: tuple[str, bytes], record: Record) -> None:
        self._send(client, *ask, record)
        idle.append(client)

    def _drained(self) -> None:
        runner = self.environment.runner
        if isinstance(runner, WorkerRunner):
            runner.send_message("drained")
        elif runner is not None:
            gevent.spawn(runner.quit)

    def _payload(self, ask: Ask) -> tuple[str, bytes]:
        body = {"model": self.generator.model_name, **ask.body}
        return ask.path, json.dumps(body).encode()

    def _send(self, client: Any, path: str, payload: bytes, record: Record) -> None:
        options: Any = self.environment.parsed_options
        with self.generator.streaming(record):
            run_stream(client, path, payload, record, key=options.api_key or None)
        self._report(record)
        if record.failed:
            gevent.sleep(0.5)  # a dead server must not turn into a busy loop

    def _report(self, record: Record) -> None:
        name = self.generator.plan.workload.kind
        fire = self.environment.events.request.fire

        def event(kind: str, seconds: float, length: int = 0, error: Any = None) -> None:
            fire(
                request_type=kind,
                name=name,
                response_time=seconds * 1000,
                response_length=length,
                exception=error,
                context={},
            )

        error = RuntimeError(record.error) if record.failed else None
        event("POST", record.latency_s, record.output_tokens, error)
        if not record.whole:
            return
        event("TTFT", record.ttft_s)
        if record.tpot_s is not None:
            event("TPOT", record.tpot_s)
        for gap in record.gaps_s[:: -(-len(record.gaps_s) // _MOST_GAPS) or 1]:
            event("ITL", gap)


# Timers count from the time that the loop read last, which was before all of this was imported:
# without this, -t would be cut short by as much.
gevent.get_hub().loop.update_now()
