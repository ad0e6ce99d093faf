"""KV accounting against published arithmetic, brute force and its own invariants."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

from vllm_attnedit import AttnEditError
from vllm_attnedit.accounting import (
    LayerKV,
    kv_bytes_per_request,
    kv_bytes_per_token,
    kv_layers,
    kv_reduction,
    padding_layers,
    requests_that_fit,
    stage_sizes,
)
from vllm_attnedit.config import FULL, LATENT, SLIDING, AttentionEdit, AttnEditConfig

GIB = 1024**3
WINDOW = 128


def teacher_fields(name: str) -> dict[str, Any]:
    """The attention dimensions of the two published teachers."""
    layers, kv_heads = {"qwen3": (36, 8), "qwen3_moe": (48, 4)}[name]
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "hidden_size": 4096,
    }


def teacher(name: str = "qwen3", **overrides: Any) -> Any:
    return CONFIG_MAPPING[name](**(teacher_fields(name) | overrides))


def gateswa(name: str = "qwen3", window: int = WINDOW, **overrides: Any) -> AttnEditConfig:
    fields = teacher_fields(name) | overrides
    types = [FULL if i % 6 == 5 else SLIDING for i in range(fields["num_hidden_layers"])]
    edit = AttentionEdit(layer_types=tuple(types), sliding_window=window, gate="headwise")
    return AttnEditConfig(name, edit, **fields)


def mla(name: str = "qwen3") -> AttnEditConfig:
    fields = teacher_fields(name)
    edit = AttentionEdit(
        layer_types=(LATENT,) * fields["num_hidden_layers"],
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    return AttnEditConfig(name, edit, **fields)


@pytest.mark.parametrize(
    ("name", "full", "latent", "hybrid", "window_layers", "window_bytes"),
    [
        ("qwen3", 147_456, 41_472, 24_576, 30, 4_096),
        ("qwen3_moe", 98_304, 55_296, 16_384, 40, 2_048),
    ],
)
def test_published_arithmetic(
    name: str, full: int, latent: int, hybrid: int, window_layers: int, window_bytes: int
) -> None:
    assert kv_bytes_per_token(teacher(name)) == full
    assert kv_bytes_per_token(mla(name)) == latent
    assert kv_bytes_per_token(gateswa(name)) == hybrid
    for length in (1, 100, 127, 128, 129, 8192, 131_072):
        assert kv_bytes_per_request(teacher(name), length) == full * length
        assert kv_bytes_per_request(mla(name), length) == latent * length
        windows = window_layers * min(length, WINDOW) * window_bytes
        assert kv_bytes_per_request(gateswa(name), length) == hybrid * length + windows


def test_published_reductions() -> None:
    assert kv_reduction(mla()) == pytest.approx(0.719, abs=5e-4)
    assert kv_reduction(mla("qwen3_moe")) == 0.4375
    for name in ("qwen3", "qwen3_moe"):
        assert kv_reduction(gateswa(name)) == pytest.approx(5 / 6)
    # At least 80% from about 3.2K tokens on.
    assert kv_reduction(gateswa(), length=3150) < 0.8 <= kv_reduction(gateswa(), length=3200)
    # Up to the window nothing is saved.
    assert kv_reduction(gateswa(), length=WINDOW) == 0


def test_mla_holds_more_than_full_attention_at_tp4() -> None:
    assert kv_bytes_per_token(mla(), tp=4) == 40.5 * 1024
    assert kv_bytes_per_token(teacher(), tp=4) == 36 * 1024
    assert kv_reduction(mla(), tp=4) == pytest.approx(-0.125)
    assert kv_reduction(mla(), tp=2) > 0
    assert kv_reduction(gateswa(), tp=4) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("layers", "length", "hybrid", "full"),
    [(36, 32_768, 52.2, 8.9), (36, 4096, 362.9, 71.1), (48, 32_768, 39.1, 6.7)],
)
def test_requests_that_fit(layers: int, length: int, hybrid: float, full: float) -> None:
    """40 GiB, 8 KV heads of 128, blocks of 16: what vLLM's steady decode holds."""
    dims: dict[str, Any] = {"num_hidden_layers": layers}
    for config, expected in ((gateswa(**dims), hybrid), (teacher(**dims), full)):
        held = kv_bytes_per_request(config, length, block_size=16)
        assert 40 * GIB / held == pytest.approx(expected, abs=0.06)
        assert requests_that_fit(config, length, 40 * GIB) == int(expected)


def test_kept_norms_cost_four_bytes_a_head_which_are_sharded() -> None:
    edit = dict(mla().attention_edit) | {"qk_norm": "per_head"}
    fields = mla().teacher_config().to_dict()
    normed = AttnEditConfig("qwen3", edit, **fields)
    for tp in (1, 4):
        more = kv_bytes_per_token(normed, tp=tp) - kv_bytes_per_token(mla(), tp=tp)
        assert more == 36 * 4 * 32 // tp


def test_dtype_widths() -> None:
    assert kv_bytes_per_token(gateswa(), kv_dtype="fp8") * 2 == kv_bytes_per_token(gateswa())
    assert kv_bytes_per_token(gateswa(), kv_dtype="fp32") == 2 * kv_bytes_per_token(gateswa())
    # vLLM serves float32 weights in 16 bits by default, so 'auto' does not follow the file.
    assert kv_bytes_per_token(gateswa(dtype="float32")) == kv_bytes_per_token(gateswa())


def test_plain_teachers_of_other_shapes() -> None:
    llama = CONFIG_MAPPING["llama"](num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    assert kv_bytes_per_token(llama) == 2 * 2 * 4 * 16 * 2  # no KV heads given: one a query head
    qwen2 = teacher("qwen3").to_dict() | {"num_hidden_layers": 4, "layer_types": None}
    qwen2.pop("model_type")
    windowed = CONFIG_MAPPING["qwen2"](
        **(qwen2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3})
    )
    assert [layer.window for layer in kv_layers(windowed)] == [None, None, None, 64]
    ignored = CONFIG_MAPPING["qwen2"](**(qwen2 | {"sliding_window": 64}))
    assert kv_bytes_per_token(ignored) == 4 * 4096


@given(window=st.integers(1, 300), block=st.integers(1, 64), length=st.integers(1, 1000))
def test_window_blocks_are_the_worst_alignment(window: int, block: int, length: int) -> None:
    layer = LayerKV(SLIDING, width=2, heads=1, window=window)
    seen = min(window, length)
    held = [
        (last // block) - ((last - seen + 1) // block) + 1  # blocks that keys first..last touch
        for last in range(seen - 1, length)
    ]
    bound = layer.tokens_held(length, block)
    assert max(held) * block <= bound <= -(-length // block) * block
    if length >= window + block:  # every alignment has come by
        assert max(held) * block == bound


@given(length=st.integers(1, 20_000), block=st.integers(1, 256), window=st.integers(1, 5000))
def test_blocks_bound_exact_tokens(length: int, block: int, window: int) -> None:
    config = gateswa(num_hidden_layers=6, window=window)
    exact = kv_bytes_per_request(config, length)
    rounded = kv_bytes_per_request(config, length, block_size=block)
    most = 2 * block * 6 * 4096  # a layer wastes less than two blocks
    assert exact <= rounded < exact + most
    assert rounded <= kv_bytes_per_request(teacher(num_hidden_layers=6), length, block_size=block)
    grown = kv_bytes_per_request(config, length + 1) - exact
    assert grown == kv_bytes_per_token(config) + (5 * 4096 if length < window else 0)


@given(layers=st.integers(1, 80), pp=st.integers(1, 16))
def test_stages(layers: int, pp: int) -> None:
    if pp > layers:
        with pytest.raises(AttnEditError, match=rf"pp: {pp}: use at most {layers}"):
            stage_sizes(layers, pp)
        return
    sizes = stage_sizes(layers, pp)
    assert len(sizes) == pp
    assert sum(sizes) == layers
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == layers // pp
    assert sizes[:-1] == sorted(sizes[:-1])


def test_stages_as_vllm_splits_them() -> None:
    assert stage_sizes(36, 4) == [9, 9, 9, 9]
    assert stage_sizes(30, 4) == [7, 8, 8, 7]
    assert stage_sizes(11, 4) == [3, 3, 3, 2]


def test_pipeline_takes_the_fullest_stage() -> None:
    # 12 layers in 4 stages of 3: two stages hold one full layer, the others none.
    config = gateswa(num_hidden_layers=12)
    assert kv_bytes_per_token(config, pp=4) == 4096
    assert kv_bytes_per_request(config, 1000, pp=4) == 4096 * (1000 + 2 * WINDOW)
    assert kv_bytes_per_token(teacher(), pp=4) * 4 == kv_bytes_per_token(teacher())


@given(tp=st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_tensor_parallel(tp: int) -> None:
    whole = kv_bytes_per_token(gateswa())
    assert kv_bytes_per_token(gateswa(), tp=tp) == whole // min(tp, 8)  # one head a GPU at least
    assert kv_bytes_per_token(mla(), tp=tp) == kv_bytes_per_token(mla())


def test_padding_of_hybrids() -> None:
    def padding(full: int, window: int) -> int:
        types = (FULL,) * full + (SLIDING,) * window
        edit = AttentionEdit(layer_types=types, sliding_window=8)
        fields = teacher_fields("qwen3") | {"num_hidden_layers": full + window}
        return padding_layers(AttnEditConfig("qwen3", edit, **fields))

    assert padding_layers(gateswa()) == padding_layers(mla()) == padding_layers(teacher()) == 0
    assert padding(5, 23) == 2  # groups of 5
    assert padding(12, 13) == 1  # groups of 13
    assert padding(10, 15) == 5  # 15 is not less than 1.5 x 10: groups of 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp": 3}, "tp: 3: use a divisor of num_attention_heads, 32"),
        ({"tp": 0}, "tp: 0: give an integer >= 1"),
        ({"pp": 37}, "pp: 37: use at most 36, the number of layers"),
        ({"kv_dtype": "int4"}, "kv_dtype: int4: use one of auto, bf16, fp16, fp32, fp8"),
        ({"length": 0}, "length: 0: give an integer >= 1"),
        ({"length": 1.5}, "length: 1.5: give an integer >= 1"),
        ({"block_size": -16}, "block_size: -16: give an integer >= 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AttnEditError) as caught:
        kv_bytes_per_request(gateswa(), **({"length": 8} | arguments))
    assert str(caught.value) == message


def test_bad_models() -> None:
    odd_heads = teacher(num_attention_heads=12, num_key_value_heads=3)
    with pytest.raises(
        AttnEditError, match="tp: 2: use a divisor or a multiple of num_key_value_he"
    ):
        kv_bytes_per_token(odd_heads, tp=2)
    assert kv_bytes_per_token(odd_heads, tp=6) == 36 * 2 * 128 * 2
    with pytest.raises(
        AttnEditError, match="model_type: gpt2: use a teacher of a supported family"
    ):
        kv_bytes_per_token(CONFIG_MAPPING["gpt2"]())
    with pytest.raises(AttnEditError, match="memory: -1: give a number of bytes >= 0"):
        requests_that_fit(gateswa(), 100, -1)
    windows_only = CONFIG_MAPPING["qwen2"](
        use_sliding_window=True, sliding_window=64, max_window_layers=0
    )
    with pytest.raises(AttnEditError, match="length: None: give a length"):
        kv_reduction(windows_only, windows_only)
    assert kv_reduction(windows_only, windows_only, length=100) == 0


def test_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, vllm_attnedit.accounting; print(*{'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
