"""KV-cache memory by formula: per token, per request and per GPU, against the teacher.

Needs a configuration only: no torch, no weights, no device. ``config`` is an ``AttnEditConfig`` or
a plain teacher's transformers configuration (of a supported family). Memory is in bytes.

Under tensor parallelism KV heads are sharded, at least one to a GPU, while a latent has no heads
to shard and stands whole on every GPU. So MLA, which caches less in total, can hold *more* per GPU
than full attention: compare at the ``tp`` of the deployment.
"""

from __future__ import annotations

from vllm_attnedit.accounting.layers import LayerKV, kv_layers
from vllm_attnedit.accounting.memory import (
    KV_DTYPE_BYTES,
    kv_bytes_per_request,
    kv_bytes_per_token,
    kv_reduction,
    requests_that_fit,
)
from vllm_attnedit.accounting.placement import (
    check_tp,
    group_size,
    pack_size,
    padding_layers,
    stage_sizes,
)

__all__ = [
    "KV_DTYPE_BYTES",
    "LayerKV",
    "check_tp",
    "group_size",
    "kv_bytes_per_request",
    "kv_bytes_per_token",
    "kv_layers",
    "kv_reduction",
    "pack_size",
    "padding_layers",
    "requests_that_fit",
    "stage_sizes",
]
