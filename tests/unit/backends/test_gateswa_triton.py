"""The CUDA backend's steps on CPU tensors, where its operators run their oracles: what is written
when, with norm and rotation left to it or done before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope

from vllm_attnedit.backends.gateswa_triton import (
    GateSWAImpl,
    GateSWAMetadata,
    GateSWATritonBackend,
)
from vllm_attnedit.backends.prologue import Prologue, can_rotate
from vllm_attnedit.layers.packing import Pack
from vllm_attnedit.layers.window import WindowAttention

N, K, D, B, W = 4, 2, 32, 16, 20
PACK = 3  # layers in a page, of which this one is the second
LENGTHS = (40, 17, 70)


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(D, max_position=256, rope_parameters={"rope_type": "default"},
                        dtype=torch.float32)  # fmt: skip
        norms = [RMSNorm(D, eps=1e-5) for _ in range(2)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return {"rotary_emb": rope, "q_norm": norms[0], "k_norm": norms[1]}


class Pages:
    """A request list's pages, and a step over them. A row of blocks a request, none shared."""

    def __init__(self, packed: bool) -> None:
        self.blocks = 8
        self.heads = K * PACK if packed else K
        cache = torch.full((1 + len(LENGTHS) * self.blocks, 2, B, self.heads, D), float("nan"))
        self.cache = cache
        self.table = 1 + torch.arange(len(LENGTHS) * self.blocks).view(len(LENGTHS), -1).int()

    def metadata(self, computed: list[int], new: list[int]) -> GateSWAMetadata:
        positions = torch.cat([torch.arange(c, c + n) for c, n in zip(computed, new, strict=True)])
        rows = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()])
        return GateSWAMetadata(
            num_actual_tokens=sum(new),
            max_query_len=max(new),
            has_chunks=max(new) > 1,
            query_start_loc=starts.int(),
            seq_lens=torch.tensor([c + n for c, n in zip(computed, new, strict=True)]).int(),
            positions=positions,
            block_table=self.table,
            slot_mapping=self.table[rows, positions // B].long() * B + positions % B,
            step=None,  # type: ignore[arg-type]  # of the builder, which is not here
        )


def run(steps: list[tuple[list[int], list[int]]], inputs: list[dict[str, Tensor]],
        layer: SimpleNamespace, impl: GateSWAImpl, pages: Pages,
        finish: Any = None) -> list[Tensor]:  # fmt: skip
    outputs = []
    for (computed, new), step in zip(steps, inputs, strict=True):
        metadata = pages.metadata(computed, new)
        q, k = step["q"], step["k"]
        if finish is not None:
            q, k = finish(metadata.positions, q, k)
        before = (q.clone(), k.clone())
        out = torch.full((sum(new) + 2, N, D), float("nan"))  # two rows of padding
        impl.forward(layer, q, k, step["v"], pages.cache, metadata, out, output_scale=step["gate"])
        assert torch.equal(q, before[0]) and torch.equal(k, before[1])
        outputs.append(out[: sum(new)])
    return outputs


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_norm_and_rotation_in_the_backend_change_nothing(
    modules: dict[str, Any], normed: bool, packed: bool
):
    """Chunks, a step mixed of chunks and decodes, and decodes, on pages full of NaN."""
    torch.manual_seed(0)
    steps = [
        ([0, 0, 0], [33, 9, 40]),
        ([33, 9, 40], [1, 8, 30]),
        ([34, 17, 70], [1, 1, 1]),
        ([35, 18, 71], [1, 1, 1]),
    ]
    inputs = [
        {
            # Views of one projection's output, as the layer passes them.
            "q": fused[:, : N * D].view(-1, N, D),
            "k": fused[:, N * D : (N + K) * D].view(-1, K, D),
            "v": fused[:, (N + K) * D :].view(-1, K, D),
            "gate": torch.randn(len(fused), N),
        }
        for fused in (torch.randn(sum(new) + 2, (N + 2 * K) * D) for _, new in steps)
    ]
    kept = modules if normed else {"rotary_emb": modules["rotary_emb"]}
    impl = GateSWAImpl(N, D, D**-0.5, K, None, W, first_kv_head=K if packed else 0)
    scale = torch.ones(())

    def layer(prologue: Prologue | None) -> SimpleNamespace:
        return SimpleNamespace(prologue=prologue, _k_scale=scale, _v_scale=scale)

    def finish(positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q.clone(), k.clone()
        n = len(positions)
        if normed:
            q, k = modules["q_norm"].forward_native(q), modules["k_norm"].forward_native(k)
        rotated = modules["rotary_emb"].forward_native(
            positions, q[:n].flatten(1), k[:n].flatten(1)
        )
        q[:n], k[:n] = (x.view(n, -1, D) for x in rotated)
        return q, k

    with torch.no_grad():
        pages, plain = Pages(packed), Pages(packed)
        ours = run(steps, inputs, layer(Prologue(**kept)), impl, pages)
        expected = run(steps, inputs, layer(None), impl, plain, finish)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pages.cache, plain.cache, rtol=1e-5, atol=1e-5, equal_nan=True)
    if packed:  # the other layers' slices are untouched
        others = [h for h in range(K * PACK) if not K <= h < 2 * K]
        assert pages.cache[:, :, :, others].isnan().all()
    assert not pages.cache[:, :, :, impl.kv_heads].isnan().all()


@pytest.mark.parametrize("in_backend", [False, True])
def test_a_chunk_reads_the_old_tail_before_the_new_one_takes_its_blocks(
    modules: dict[str, Any], in_backend: bool
):
    """As the block manager hands them out: the third and fourth block are the first and second."""
    torch.manual_seed(0)
    steps = [([0, 0, 0], [30, 1, 1]), ([30, 1, 1], [50, 1, 1])]
    inputs = [
        {
            "q": torch.randn(sum(new), N, D),
            "k": torch.randn(sum(new), K, D),
            "v": torch.randn(sum(new), K, D),
            "gate": torch.randn(sum(new), N),
        }
        for _, new in steps
    ]
    impl = GateSWAImpl(N, D, D**-0.5, K, None, W)
    prologue = Prologue(modules["rotary_emb"]) if in_backend else None
    layer = SimpleNamespace(prologue=prologue, _k_scale=None, _v_scale=None)
    own, reused = Pages(packed=False), Pages(packed=False)
    expected = run(steps, inputs, layer, impl, own)
    first = run(steps[:1], inputs[:1], layer, impl, reused)
    reused.table[0, 2:5] = torch.tensor([0, *reused.table[0, :2].tolist()])
    second = run(steps[1:], inputs[1:], layer, impl, reused)
    for a, b in zip([*first, *second], expected, strict=True):
        torch.testing.assert_close(a, b)
    assert reused.cache[0].isnan().all()  # nothing goes to the null block


def test_vllms_layer_builds_it(modules: dict[str, Any]):
    """vLLM passes options of its own along, by position and by name."""
    config = VllmConfig()
    with set_current_vllm_config(config):
        layers = [
            WindowAttention(
                N, D, D**-0.5, num_kv_heads=K, layer_idx=i, prefix=f"model.layers.{i}.attn",
                pack=Pack(holder=0, slot=i, size=2), prologue=Prologue(modules["rotary_emb"]),
                cache_config=config.cache_config, per_layer_sliding_window=W,
                attn_backend=GateSWATritonBackend,
            )
            for i in range(2)
        ]  # fmt: skip
    assert [layer.impl.kv_heads for layer in layers] == [slice(0, K), slice(K, 2 * K)]
    assert [layer.impl.sliding_window for layer in layers] == [W, W]
    assert layers[0].kv_sharing_target_layer_name is None
    assert layers[1].kv_sharing_target_layer_name == "model.layers.0.attn"
    # The prologue's modules are not the layer's own: checkpoints name their tensors once.
    assert not [name for name, _ in layers[0].named_parameters()]


def test_only_a_rotation_by_table_is_taken_over(modules: dict[str, Any]):
    assert can_rotate(modules["rotary_emb"])
    assert not can_rotate(torch.nn.Identity())

    class Other(RotaryEmbedding):
        def forward_native(self, *arguments: Any) -> Any:
            return arguments

    assert not can_rotate(Other.__new__(Other))
