"""vLLM's own MLA layer in the served model, on CPU: a backend in plain torch stands in for the
tuned kernels, so that everything around them is vLLM's and ours as on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.attention import mla_attention

from tests.integration.engine import (
    assert_equal,
    engine,
    generate,
    random_prompts,
    reference,
)
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.backends.latent import LatentBackend, LatentImpl
from vllm_attnedit.backends.latent_cache import write_entries
from vllm_attnedit.backends.latent_steps import LatentMetadata, LatentMetadataBuilder
from vllm_attnedit.layers import latent as layer_module
from vllm_attnedit.ops.mla_decode import mla_decode

pytestmark = pytest.mark.integration


@dataclass
class Metadata(LatentMetadata):
    """With the names by which vLLM's layer asks for the two halves."""

    @property
    def num_decodes(self) -> int:
        return len(self.seq_lens)

    @property
    def num_prefills(self) -> int:
        return 0 if self.prompt_start_loc is None else len(self.prompt_start_loc) - 1

    @property
    def decode(self) -> Metadata:
        return self


class Builder(LatentMetadataBuilder):
    def build(self, *arguments: Any, **options: Any) -> Metadata:
        built = super().build(*arguments, **options)
        return Metadata(**{f.name: getattr(built, f.name) for f in fields(built)})


class Impl:
    """The interface of vLLM's MLA backends on this project's oracles."""

    supports_quant_query_input = False
    dcp_world_size = 1

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        names = ("num_heads", "head_size", "scale", "kv_lora_rank", "qk_rope_head_dim")
        self.ours = LatentImpl(**{name: settings[name] for name in names})
        self.up = settings["kv_b_proj"]

    def do_kv_cache_update(
        self, latent: Tensor, k_pe: Tensor, cache: Tensor, slots: Tensor, *unused: Any
    ) -> None:
        key = torch.cat([latent, k_pe.squeeze(1)], dim=-1)[: len(slots)]
        write_entries(
            key, cache, slots, rank=self.ours.rank, kv_cache_dtype="auto", scale=torch.ones(())
        )

    def forward_mqa(
        self, q: tuple[Tensor, Tensor], cache: Tensor, metadata: Metadata, layer: Any
    ) -> tuple[Tensor, None]:
        attended = mla_decode(
            *q,
            cache,
            metadata.block_table,
            metadata.seq_lens,
            metadata.query_start_loc,
            scale=self.settings["scale"],
            max_seq_len=metadata.max_seq_len,
            max_query_len=metadata.max_decode_len,
        )
        return attended, None

    def forward_mha(
        self,
        q: Tensor,
        latent: Tensor,
        k_pe: Tensor,
        cache: Tensor,
        metadata: Metadata,
        k_scale: Tensor,
        output: Tensor,
    ) -> None:
        key = torch.cat([latent, k_pe.squeeze(1)], dim=-1)
        out = output.view(-1, self.settings["num_heads"], self.settings["v_head_dim"])
        self.ours._prefill(SimpleNamespace(up=self.up), q, key, cache, None, metadata, out)


class Backend(LatentBackend):
    @classmethod
    def is_mla(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> Any:
        return Impl

    @staticmethod
    def get_builder_cls() -> Any:
        return Builder


@pytest.fixture
def vllms_mla(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer takes vLLM's MLA, which finds no GPU's prompt kernels."""
    monkeypatch.setattr(layer_module, "latent_backend", lambda *unused: Backend)
    monkeypatch.setattr(
        mla_attention, "get_mla_prefill_backend", lambda config: lambda **unused: None
    )


@pytest.mark.parametrize("gate", ["headwise", "elementwise", None])
def test_served_on_vllms_mla_equals_the_reference(gate: str | None, vllms_mla, tmp_path: Path):
    q_lora = {"q_lora_rank": 48} if gate is None else {}
    model = tiny_edited("qwen3", tiny_edit("mla", gate=gate, **q_lora))
    prompts = random_prompts((1, 7, 40, 67, 101))
    with engine(tiny_edited_checkpoint(model, tmp_path)) as llm:
        core = llm.llm_engine.engine_core.engine_core
        layers = core.vllm_config.compilation_config.static_forward_context.values()
        assert {type(layer) for layer in layers} == {mla_attention.MLAAttention}
        outputs = generate(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(model, prompt))
