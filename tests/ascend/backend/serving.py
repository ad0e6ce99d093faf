"""An edited model as vllm-ascend serves it, on a CPU: real configuration, model, backends, metadata
builders and block managers; the runner is played, and NPU operators are those of
:mod:`tests.ascend.npu_operators`.

As in a real worker, block tables only ever grow by the ids that the scheduler hands out, ids of
returned blocks included, and layers of different groups share memory. Blocks that nobody holds, and
the prefix cache neither, are poisoned before every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.utils.network_utils import get_open_port
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_groups,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, MLAAttentionSpec
from vllm.v1.request import Request, RequestStatus

from vllm_attnedit.hf import AttnEditForCausalLM

BLOCK = 128
POISON = 300.0


@contextmanager
def one_rank(config: VllmConfig) -> Iterator[None]:
    """Process groups of one rank, and the configuration as the current one."""
    with set_current_vllm_config(config):
        init_distributed_environment(
            1, 0, f"tcp://127.0.0.1:{get_open_port()}", local_rank=0, backend="gloo"
        )
        initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


def engine_config(folder: Path, **overrides: Any) -> VllmConfig:
    """vLLM's configuration of a checkpoint, as ``vllm serve`` makes it."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "skip_tokenizer_init": True,
        "async_scheduling": False,
    }
    return EngineArgs(model=str(folder), **(settings | overrides)).create_engine_config()


@dataclass
class Running:
    """A request as scheduler and worker see it."""

    request: Request
    tables: list[list[int]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # (vocabulary,) a position
    hit: int = 0  # tokens that the prefix cache had: they have no logits


class Server:
    """Requests in, logits of every position out."""

    def __init__(
        self, reference: AttnEditForCausalLM, config: VllmConfig, *, num_blocks: int = 64
    ) -> None:
        self.config = config
        self.model = initialize_model(config)
        self.model.load_weights(reference.state_dict().items())
        self.layers = {
            name: layer
            for name, layer in config.compilation_config.static_forward_context.items()
            if isinstance(layer, AttentionLayerBase)
        }
        for layer in self.layers.values():
            layer.process_weights_after_loading(config.model_config.dtype)
        specs = {name: layer.get_kv_cache_spec(config) for name, layer in self.layers.items()}
        groups = get_kv_cache_groups(config, specs)
        self.names = [group.layer_names for group in groups]
        self.specs = [group.kv_cache_spec for group in groups]
        self.builders = [
            self.layers[names[0]]
            .get_attn_backend()
            .get_builder_cls()(spec, names, config, torch.device("cpu"))
            for names, spec in zip(self.names, self.specs)
        ]
        self.memory = [self._pages(num_blocks) for _ in range(max(map(len, self.names)))]
        for names in self.names:
            for name, pages in zip(names, self.memory):
                self.layers[name].kv_cache = pages
        scheduler = config.scheduler_config
        caching = bool(config.cache_config.enable_prefix_caching)
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=config.model_config.max_model_len,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            enable_caching=caching,
        )
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256) if caching else None
        self.running: list[Running] = []

    def _pages(self, num_blocks: int) -> tuple[Tensor, Tensor]:
        spec = self.specs[0]
        widths = (spec.head_size, spec.head_size)
        if isinstance(spec, MLAAttentionSpec):
            layer = self.layers[self.names[0][0]]
            widths = (layer.kv_lora_rank, layer.qk_rope_head_dim)
        keys, values = (
            torch.full((num_blocks, BLOCK, spec.num_kv_heads, width), POISON) for width in widths
        )
        return keys, values

    def add(self, prompt: list[int]) -> Running:
        request = Request(
            f"r{len(self.running)}",
            prompt,
            SamplingParams(max_tokens=4096, temperature=0),
            None,
            block_hasher=self.hasher,
        )
        self.running.append(Running(request))
        return self.running[-1]

    def finish(self, run: Running) -> None:
        """Give a request's blocks back; what is hashed stays for others."""
        run.request.status = RequestStatus.FINISHED_STOPPED
        self.manager.free(run.request)

    def step(self, wanted: dict[int, int]) -> None:
        """Run up to ``wanted[i]`` tokens of request i; append the greedy token at its end."""
        self.manager.new_step_starts()
        batch = [(self.running[i], self._schedule(self.running[i], n)) for i, n in wanted.items()]
        # Decodes come first, as vLLM orders a batch.
        batch.sort(key=lambda entry: entry[1] > 1)
        self._poison()
        logits = self._execute(batch).split([new for _, new in batch])
        for (run, new), rows in zip(batch, logits):
            run.logits.extend(rows)
            request = run.request
            request.num_computed_tokens += new
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(int(rows[-1].argmax()))

    def _schedule(self, run: Running, tokens: int) -> int:
        request = run.request
        first, cached = not run.tables, None
        if first and self.hasher is not None:
            cached, run.hit = self.manager.get_computed_blocks(request)
        new = min(tokens, request.num_tokens - request.num_computed_tokens - run.hit * first)
        allocated = self.manager.allocate_slots(request, new, run.hit * first, cached)
        assert allocated is not None, "the test's memory is too small"
        if first:
            request.num_computed_tokens = run.hit
            run.tables = [list(ids) for ids in self.manager.get_block_ids(request.request_id)]
        else:
            for table, ids in zip(run.tables, allocated.get_block_ids(), strict=True):
                table.extend(ids)
        return new

    def _poison(self) -> None:
        pool = self.manager.block_pool.blocks
        free = [b.block_id for b in pool if not b.ref_cnt and b.block_hash is None]
        for keys, values in self.memory:
            keys[free], values[free] = POISON, -POISON
            keys[0], values[0] = POISON, -POISON

    def _execute(self, batch: list[tuple[Running, int]]) -> Tensor:
        from vllm_ascend.ascend_forward_context import set_ascend_forward_context

        news = [new for _, new in batch]
        computed = [run.request.num_computed_tokens for run, _ in batch]
        metadata: dict[str, Any] = {}
        for group, (names, builder) in enumerate(zip(self.names, self.builders)):
            built = builder.build(0, self._common(batch, news, computed, group))
            metadata |= dict.fromkeys(names, built)
        positions = torch.cat([torch.arange(c, c + n) for c, n in zip(computed, news)])
        tokens = [
            token
            for (run, new), at in zip(batch, computed)
            for token in run.request.all_token_ids[at : at + new]
        ]
        with (
            torch.inference_mode(),
            set_ascend_forward_context(metadata, self.config, num_tokens=sum(news)),
        ):
            hidden = self.model(torch.tensor(tokens), positions)
            return self.model.compute_logits(hidden)

    def _common(
        self, batch: list[tuple[Running, int]], news: list[int], computed: list[int], group: int
    ) -> Any:
        from vllm_ascend.attention.attention_v1 import AscendAttentionState as State
        from vllm_ascend.attention.utils import AscendCommonAttentionMetadata

        if not any(computed):
            state = State.PrefillNoCache
        elif max(news) == 1:
            state = State.DecodeOnly
        else:
            state = State.ChunkedPrefill
        tables = [torch.tensor(run.tables[group], dtype=torch.int32) for run, _ in batch]
        slots = [
            table[torch.arange(c, c + n) // BLOCK] * BLOCK + torch.arange(c, c + n) % BLOCK
            for table, c, n in zip(tables, computed, news)
        ]
        starts = torch.tensor([0, *news], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor(computed, dtype=torch.int32) + torch.tensor(news, dtype=torch.int32)
        return AscendCommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            _seq_lens_cpu=lengths,
            seq_lens_cpu=lengths,
            num_computed_tokens_cpu=torch.tensor(computed, dtype=torch.int32),
            num_reqs=len(batch),
            num_actual_tokens=sum(news),
            max_query_len=max(news),
            max_seq_len=int(lengths.max()),
            block_table_tensor=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True),
            slot_mapping=torch.cat(slots).int(),
            causal=True,
            num_input_tokens=sum(news),
            actual_seq_lengths_q=starts[1:].tolist(),
            positions=torch.cat([torch.arange(c, c + n) for c, n in zip(computed, news)]),
            attn_state=state,
            decode_token_per_req=1,
        )


@torch.no_grad()
def expected_logits(reference: AttnEditForCausalLM, run: Running) -> Tensor:
    """``(positions, vocabulary)`` of the reference model over the request's tokens."""
    end = run.hit + len(run.logits)
    return reference(torch.tensor([run.request.all_token_ids[:end]])).logits[0, run.hit :]


def worst_error(reference: AttnEditForCausalLM, run: Running) -> float:
    """The largest difference from the reference, of any position's logits."""
    difference = torch.stack(run.logits) - expected_logits(reference, run)
    return float(difference.abs().max())
