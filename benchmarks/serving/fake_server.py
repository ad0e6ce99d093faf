"""An OpenAI-compatible server that computes nothing and keeps exact delays, to test the harness.

    python -m benchmarks.serving.fake_server --port 8000 --ttft 0.1 --tpot 0.02

Every answer's first token comes ``ttft`` seconds after its request, the next ones ``tpot`` apart;
at most ``slots`` requests run at once and the others wait, as in vLLM. It serves vLLM's metrics of
the same names, for each of ``--data-parallel-size`` engines, and says at its start what vLLM would
say of its KV cache. ``--fail-after N`` exits at request N with the last words ``--fail-with``;
``--hang`` never comes up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from aiohttp import web


@dataclass
class Fake:
    """Settings and counters."""

    model: str
    ttft: float
    tpot: float
    slots: int
    blocks: int
    fail_after: int
    fail_with: str
    engines: int = 1
    running: int = 0
    waiting: int = 0
    requests: int = 0
    generated: int = 0
    prompted: int = 0
    answered: int = 0

    def __post_init__(self) -> None:
        self.free = asyncio.Semaphore(self.slots)


FAKE = web.AppKey("fake", Fake)


async def complete(request: web.Request) -> web.StreamResponse:
    """Both APIs; the prompt's length is that of its ids or its words."""
    arrived = time.monotonic()
    fake, body = request.app[FAKE], await request.json()
    if body.get("model") != fake.model:
        return web.json_response(
            {"error": {"message": f"The model `{body.get('model')}` does not exist."}}, status=404
        )
    fake.requests += 1
    if fake.requests == fake.fail_after:
        print(fake.fail_with, flush=True)
        os._exit(1)
    chat = "messages" in body
    prompt = _prompt_tokens(body)
    fake.waiting += 1
    async with fake.free:
        fake.waiting -= 1
        fake.running += 1
        try:
            return await _stream(request, fake, body["max_tokens"], prompt, chat, arrived)
        except ConnectionResetError:  # the client hung up, as it may
            return web.Response()
        finally:
            fake.running -= 1


def _prompt_tokens(body: dict[str, Any]) -> int:
    if "messages" in body:
        return sum(len(message["content"].split()) for message in body["messages"])
    return len(body["prompt"])


async def _stream(
    request: web.Request, fake: Fake, count: int, prompt: int, chat: bool, arrived: float
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    start = max(arrived, time.monotonic() - 0.005)
    for i in range(count):
        await _wait_until(start + fake.ttft + i * fake.tpot)
        if chat and i == 0:
            await _send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        choice = {"delta": {"content": f" t{i}"}} if chat else {"text": f" t{i}"}
        await _send(response, {"choices": [{"index": 0, **choice}]})
        fake.generated += 1
        fake.prompted += prompt if i == 0 else 0
    usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
    await _send(response, {"choices": [], "usage": usage})
    await response.write(b"data: [DONE]\n\n")
    fake.answered += 1
    return response


async def _wait_until(due: float) -> None:
    """Timers wake up to a millisecond late: the last two are spent looking at the clock."""
    await asyncio.sleep(max(0.0, due - time.monotonic() - 0.002))
    while time.monotonic() < due:
        await asyncio.sleep(0)


async def _send(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n")


async def metrics(request: web.Request) -> web.Response:
    """As many of vLLM's as the harness reads; each running request holds one block of its engine.

    Requests that run are shared out evenly; the other counts are the first engine's.
    """
    fake = request.app[FAKE]
    lines = []
    for number in range(fake.engines):
        running = (fake.running + fake.engines - 1 - number) // fake.engines
        first = number == 0
        engine = f'{{engine="{number}",model_name="fake"}}'
        lines += [
            f'vllm:cache_config_info{{engine="{number}",block_size="16",'
            f'num_gpu_blocks="{fake.blocks + 1}",cache_dtype="auto"}} 1.0',
            f"vllm:num_requests_running{engine} {running}",
            f"vllm:num_requests_waiting{engine} {fake.waiting * first}",
            f"vllm:kv_cache_usage_perc{engine} {running / fake.blocks}",
            f"vllm:num_preemptions_total{engine} 0",
            f"vllm:generation_tokens_total{engine} {fake.generated * first}",
            f"vllm:prompt_tokens_total{engine} {fake.prompted * first}",
            f"vllm:request_success_total{engine} {fake.answered * first}",
        ]
    return web.Response(text="\n".join(lines) + "\n")


def application(fake: Fake) -> web.Application:
    """The server's routes."""
    app = web.Application(client_max_size=1 << 28)
    app[FAKE] = fake

    async def models(request: web.Request) -> web.Response:
        data = [{"id": fake.model, "root": "fake", "max_model_len": 1 << 20}]
        return web.json_response({"object": "list", "data": data})

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    app.add_routes(
        [
            web.get("/health", health),
            web.get("/metrics", metrics),
            web.get("/v1/models", models),
            web.post("/v1/completions", complete),
            web.post("/v1/chat/completions", complete),
        ]
    )
    return app


def report(length: int, blocks: int, kv_gib: float) -> str:
    """An engine's own words on its KV cache, as vLLM's log has them."""
    tokens = 16 * blocks
    return (
        f"INFO [gpu_worker.py:480] Available KV cache memory: {kv_gib:.2f} GiB\n"
        f"INFO [kv_cache_utils.py:1744] GPU KV cache size: {tokens:,} tokens\n"
        f"INFO [kv_cache_utils.py:1745] Maximum concurrency for {length:,} tokens per request: "
        f"{tokens / length:.2f}x"
    )


def main() -> None:
    """Serve until ended; options that are not the fake's own are ignored, as a stand-in's must."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", default="fake")
    parser.add_argument("--ttft", type=float, default=0.1, help="seconds")
    parser.add_argument("--tpot", type=float, default=0.02, help="seconds")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--kv-gib", type=float, default=1.0, help="KV memory of a device")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--data-parallel-size", type=int, default=1, help="engines")
    parser.add_argument("--fail-after", type=int, default=0)
    parser.add_argument("--fail-with", default="torch.OutOfMemoryError: CUDA out of memory.")
    parser.add_argument("--hang", action="store_true")
    options, _ = parser.parse_known_args()
    if options.hang:
        print("INFO starting", flush=True)
        time.sleep(3600)
    fake = Fake(
        options.served_model_name,
        options.ttft,
        options.tpot,
        options.slots,
        options.blocks,
        options.fail_after,
        options.fail_with,
        options.data_parallel_size,
    )
    for _ in range(fake.engines):
        print(report(options.max_model_len, fake.blocks, options.kv_gib), flush=True)
    try:
        web.run_app(application(fake), host=options.host, port=options.port, print=None)
    except OSError as error:
        print(f"OSError: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
