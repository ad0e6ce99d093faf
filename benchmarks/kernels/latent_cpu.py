"""Latent decode on CPU against vLLM's CPU attention reading the same bytes.

    python -m benchmarks.kernels.latent_cpu [--threads 1] [--out FILE]

For each batch the control is grouped-query attention of vLLM's CPU backend, as many query heads on
the teacher's KV heads, at the length that makes its cache as large in bytes. Processor time, not
the clock: other work on the machine does not count. Beside it stands the time that the two matrix
products alone take at the rate the host library reaches on one tile, which no order of reading
could beat, vLLM's own CPU kernel for latents of 512 + 64, and another way to do it: heads as the
query rows of torch's fused attention, over keys that lie there in order already. Layers take turns:
none finds its keys in the processor's cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.provenance import provenance
from vllm_attnedit.ops.mla_decode import cpu

PAGE = 128
SCALE = 0.05


@dataclass(frozen=True)
class Model:
    """Head counts and widths of a teacher and its default MLA edit."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    rank: int
    rope: int


MODELS = (Model("qwen3-8b", 32, 8, 128, 512, 64), Model("smollm2-135m", 9, 3, 64, 192, 64))
CACHE_BYTES = 96 * 2**20
"""More than a processor's last cache."""
POINTS = ((1, 8192), (1, 32_768), (16, 4096), (32, 512))


def processor_time(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of processor time over all threads, the median of ``repeats`` after a warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return sorted(times)[len(times) // 2]


def in_turn(make: Callable[[], Callable[[], Any]], nbytes: int, repeats: int) -> float:
    """Processor time of one step, over layers that together hold more than the cache."""
    layers = [make() for _ in range(-(-CACHE_BYTES // nbytes))]
    return processor_time(lambda: [layer() for layer in layers], repeats) / len(layers)


def pages(batch: int, length: int) -> tuple[int, torch.Tensor]:
    """The number of pages and a block table without any order."""
    each = -(-length // PAGE)
    return batch * each, torch.randperm(batch * each).view(batch, each).int()


def latent(model: Model, batch: int, length: int, dtype: torch.dtype) -> Callable[[], Any]:
    """One decode step of this project's operator."""
    blocks, table = pages(batch, length)
    width = model.rank + model.rope
    cache = torch.randn(blocks, PAGE, width).to(dtype)
    query = torch.randn(batch, model.heads, width).to(dtype)
    out = query.new_empty(batch, model.heads, model.rank)
    lengths, starts = torch.full((batch,), length).int(), torch.arange(batch + 1).int()
    workspace = torch.empty(cpu.TILE_BYTES, dtype=torch.uint8)
    parts = query[..., : model.rank], query[..., model.rank :]
    return lambda: cpu.mla_decode(
        *parts, cache, table, lengths, starts, scale=SCALE, out=out, workspace=workspace
    )


def grouped(model: Model, batch: int, length: int, dtype: torch.dtype) -> Callable[[], Any]:
    """One decode step of vLLM's CPU attention."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    blocks, table = pages(batch, length)
    shape = (blocks, model.kv_heads, PAGE, model.head_dim)
    keys, values = (torch.randn(shape).to(dtype) for _ in range(2))
    query = torch.randn(batch, model.heads, model.head_dim).to(dtype)
    out = torch.empty_like(query)
    lengths, starts = torch.full((batch,), length).int(), torch.arange(batch + 1).int()
    plan = ops.cpu_attn_get_scheduler_metadata(
        batch, model.heads, model.kv_heads, model.head_dim, lengths, dtype, starts, True, -1,
        _get_attn_isa(dtype, PAGE, model.head_dim), True,
    )  # fmt: skip
    return lambda: ops.cpu_attention_with_kv_cache(
        query, keys, values, out, starts, lengths, SCALE, True, None, (-1, -1), table, 0.0, plan,
        None,
    )  # fmt: skip


def stock_latent(model: Model, batch: int, length: int, dtype: torch.dtype) -> Callable[[], Any]:
    """One decode step of vLLM's CPU kernel for latents, which takes pages of 16."""
    from vllm import _custom_ops as ops

    blocks = batch * length // 16
    table = torch.randperm(blocks).view(batch, -1).int()
    cache = torch.randn(blocks, 16, model.rank + model.rope).to(dtype)
    query = torch.randn(batch, model.heads, cache.shape[2]).to(dtype)
    out = query.new_empty(batch, model.heads, model.rank)
    lengths = torch.full((batch,), length).int()
    return lambda: ops.mla_decode_kvcache_cpu(out, query, cache, SCALE, table, lengths)


def fused(model: Model, batch: int, length: int, dtype: torch.dtype) -> Callable[[], Any]:
    """One step of torch's fused attention: heads are rows of one query, entries keys and values."""
    entries = torch.randn(batch, 1, length, model.rank + model.rope).to(dtype)
    query = torch.randn(batch, 1, model.heads, entries.shape[3]).to(dtype)
    return lambda: scaled_dot_product_attention(query, entries, entries, scale=SCALE)


def product_rate(model: Model, dtype: torch.dtype, repeats: int) -> float:
    """Operations a second of both products on one tile of 2,048 keys."""
    keys = torch.randn(2048, model.rank + model.rope).to(dtype)
    query = torch.randn(model.heads, keys.shape[1]).to(dtype)
    weights = torch.rand(model.heads, 2048).to(dtype)
    seconds = processor_time(lambda: [(query @ keys.T, weights @ keys) for _ in range(10)], repeats)
    return 10 * 2 * 2 * query.numel() * 2048 / seconds


def rows(repeats: int) -> list[dict[str, Any]]:
    """All cases; see docs of the committed form."""
    table = []
    for model in MODELS:
        for dtype in (torch.bfloat16, torch.float32):
            rate = product_rate(model, dtype, repeats)
            for batch, length in POINTS:
                nbytes = batch * length * (model.rank + model.rope) * dtype.itemsize
                token = 2 * model.kv_heads * model.head_dim * dtype.itemsize
                same = max(1, round(nbytes / token / batch))
                ours = in_turn(partial(latent, model, batch, length, dtype), nbytes, repeats)
                control = in_turn(partial(grouped, model, batch, same, dtype), nbytes, repeats)
                work = 2 * model.heads * (2 * model.rank + model.rope) * batch * length
                other = in_turn(partial(fused, model, batch, length, dtype), nbytes, repeats)
                name = str(dtype).removeprefix("torch.")
                stock = None
                if (model.rank, model.rope) == (512, 64):
                    step = partial(stock_latent, model, batch, length, dtype)
                    stock = in_turn(step, nbytes, repeats)
                table.append(
                    {
                        "case": f"mla_decode cpu {model.name} {name} B{batch} L{length}",
                        "metric": "processor_time",
                        "value": ours,
                        "unit": "s",
                        "control": f"vLLM CPU attention, length {same}: as many bytes",
                        "control_value": control,
                        "ratio": round(ours / control, 3),
                        "bytes": nbytes,
                        "products_alone": work / rate,
                        "vllm_mla_kernel": stock,
                        "fused_attention": other,
                    }
                )
    return table


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("mla_decode_cpu.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    document: dict[str, Any] = {"provenance": provenance(), "rows": rows(args.repeats)}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    for row in document["rows"]:
        print(
            f"{row['case']:<48}{1e3 * row['value']:>9.2f} ms{1e3 * row['control_value']:>9.2f} ms"
            f"{row['ratio']:>7.2f}x, products alone {1e3 * row['products_alone']:.2f} ms, "
            f"vLLM's latent kernel {1e3 * (row['vllm_mla_kernel'] or 0):.2f} ms, "
            f"fused attention {1e3 * row['fused_attention']:.2f} ms"
        )
    print(json.dumps({row["case"]: row["ratio"] for row in document["rows"]}))


if __name__ == "__main__":
    main()
