"""Bad arguments are refused before a launch, by name; good imports need no GPU stack."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.ops.dispatch import OVERRIDE_VARIABLE, implementation
from vllm_attnedit.ops.gateswa_decode import gateswa_decode
from vllm_attnedit.ops.gateswa_prefill import gateswa_prefill
from vllm_attnedit.ops.kv_write import kv_write
from vllm_attnedit.ops.mla_decode import mla_decode, preferred_kernel
from vllm_attnedit.ops.mla_prefill import mla_prefill
from vllm_attnedit.ops.sigmoid_gate import sigmoid_gate

TOKENS, HEADS, KV_HEADS, WIDTH, BLOCK = 2, 4, 2, 16, 16


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def decode_arguments():
    cache = torch.zeros(3, BLOCK, KV_HEADS, WIDTH)
    return {
        "q": torch.zeros(TOKENS, HEADS, WIDTH),
        "key_cache": cache,
        "value_cache": cache.clone(),
        "block_table": ints(1, 2)[:, None],
        "seq_lens": ints(1, 1),
        "query_start_loc": ints(0, 1, 2),
        "sliding_window": 4,
        "scale": 1.0,
    }


def prefill_arguments():
    dense = torch.zeros(TOKENS, KV_HEADS, WIDTH)
    return {**decode_arguments(), "k": dense, "v": dense.clone()}


def write_arguments():
    dense = torch.zeros(TOKENS, KV_HEADS, WIDTH)
    cache = torch.zeros(3, BLOCK, KV_HEADS, WIDTH)
    return {
        "q": torch.zeros(TOKENS, HEADS, WIDTH),
        "k": dense,
        "v": dense.clone(),
        "key_cache": cache,
        "value_cache": cache.clone(),
        "slot_mapping": torch.tensor([16, 17]),
    }


def latent_arguments():
    return {
        "q_latent": torch.zeros(TOKENS, HEADS, 32),
        "q_rope": torch.zeros(TOKENS, HEADS, 16),
        "kv_cache": torch.zeros(3, BLOCK, 48),
        "block_table": ints(1, 2)[:, None],
        "seq_lens": ints(1, 1),
        "query_start_loc": ints(0, 1, 2),
        "scale": 1.0,
        "max_seq_len": 1,
    }


def expanded_arguments():
    return {
        "q_nope": torch.zeros(TOKENS, HEADS, 32),
        "q_rope": torch.zeros(TOKENS, HEADS, 16),
        "k_nope": torch.zeros(TOKENS, HEADS, 32),
        "k_rope": torch.zeros(TOKENS, 16),
        "v": torch.zeros(TOKENS, HEADS, 32),
        "query_start_loc": ints(0, 1, 2),
        "key_start_loc": ints(0, 1, 2),
        "scale": 1.0,
    }


OPERATORS: dict[str, tuple[Callable[..., object], Callable[[], dict]]] = {
    "decode": (gateswa_decode, decode_arguments),
    "prefill": (gateswa_prefill, prefill_arguments),
    "write": (kv_write, write_arguments),
    "latent": (mla_decode, latent_arguments),
    "expanded": (mla_prefill, expanded_arguments),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_good_arguments_pass(operator):
    function, arguments = OPERATORS[operator]
    function(**arguments())


@pytest.mark.parametrize(
    ("operator", "change", "field"),
    [
        ("decode", {"sliding_window": 0}, "sliding_window"),
        ("decode", {"sliding_window": -1}, "sliding_window"),
        ("decode", {"max_query_len": 0}, "max_query_len"),
        ("decode", {"q": torch.zeros(TOKENS, HEADS, 24)}, "q.shape[2]"),
        ("decode", {"q": torch.zeros(TOKENS, HEADS, 512)}, "q.shape[2]"),
        ("decode", {"q": torch.zeros(TOKENS, HEADS, WIDTH).int()}, "q.dtype"),
        ("decode", {"q": torch.zeros(TOKENS, WIDTH, HEADS * 4).mT}, "q.stride"),
        ("decode", {"q": torch.zeros(TOKENS, HEADS * WIDTH)}, "q.shape"),
        ("decode", {"q": torch.zeros(TOKENS, 3, WIDTH)}, "key_cache.shape[2]"),
        ("decode", {"key_cache": torch.zeros(3, 8, KV_HEADS, WIDTH)}, "value_cache.shape"),
        ("decode", {"key_cache": torch.zeros(2, 3, BLOCK, KV_HEADS, WIDTH)}, "key_cache.shape"),
        ("decode", {"key_cache": torch.zeros(3, BLOCK, KV_HEADS, WIDTH).half()}, "key_cache.dtype"),
        (
            "decode",
            {"key_cache": torch.zeros(3, BLOCK, WIDTH, KV_HEADS).mT},
            "key_cache.stride",
        ),
        ("decode", {"block_table": ints(1, 2)}, "block_table.shape"),
        ("decode", {"block_table": ints(1, 2)[:, None].long()}, "block_table.dtype"),
        ("decode", {"seq_lens": ints(1)}, "seq_lens.shape"),
        ("decode", {"gate": torch.zeros(TOKENS, HEADS + 1)}, "gate.shape"),
        ("decode", {"gate": torch.zeros(TOKENS, HEADS).int()}, "gate.dtype"),
        ("decode", {"k_scale": torch.ones(2)}, "k_scale.shape"),
        ("decode", {"out": torch.zeros(TOKENS, HEADS, WIDTH).half()}, "out.dtype"),
        ("prefill", {"k": torch.zeros(1, KV_HEADS, WIDTH)}, "k.shape"),
        ("prefill", {"v": torch.zeros(TOKENS, KV_HEADS, WIDTH).half()}, "v.dtype"),
        ("prefill", {"sliding_window": 0}, "sliding_window"),
        ("write", {"slot_mapping": ints(16, 17)}, "slot_mapping.dtype"),
        ("write", {"slot_mapping": torch.zeros(3).long()}, "slot_mapping.shape"),
        ("write", {"positions": torch.zeros(TOKENS).long()}, "positions"),
        ("write", {"k_weight": torch.zeros(WIDTH + 1)}, "k_weight"),
        (
            "write",
            {"positions": torch.zeros(TOKENS).long(), "cos_sin_cache": torch.zeros(9, 32)},
            "cos_sin_cache.shape",
        ),
        (
            "write",
            {"store_k": False, "k_out": torch.zeros(TOKENS, KV_HEADS, WIDTH)},
            "k_out",
        ),
        ("latent", {"kv_cache": torch.zeros(3, BLOCK, 32)}, "kv_cache.shape"),
        ("latent", {"kv_cache": torch.zeros(3, 20, 48)}, "kv_cache.shape[1]"),
        ("latent", {"gate": torch.zeros(TOKENS, HEADS * 32)}, "gate.shape"),
        ("latent", {"max_seq_len": 0}, "max_seq_len"),
        ("latent", {"q_latent": torch.zeros(TOKENS, HEADS, 1024)}, "q_latent.shape[2]"),
        ("expanded", {"k_rope": torch.zeros(TOKENS, HEADS, 16)}, "k_rope.shape"),
        ("expanded", {"key_start_loc": ints(0, 2)}, "key_start_loc"),
        ("expanded", {"lse": torch.zeros(TOKENS, HEADS).half()}, "lse"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(operator, change, field):
    function, arguments = OPERATORS[operator]
    with pytest.raises(AttnEditError) as error:
        function(**{**arguments(), **change})
    assert error.value.field == field
    assert error.value.fix
    assert "\n" not in str(error.value)


def test_blocks_of_other_than_16_tokens_are_refused():
    cache = torch.zeros(3, 24, KV_HEADS, WIDTH)
    change = {"key_cache": cache, "value_cache": cache}
    with pytest.raises(AttnEditError, match="multiple of 16"):
        gateswa_decode(**{**decode_arguments(), **change})


def test_a_gate_is_needed_to_gate():
    with pytest.raises(AttnEditError, match="gate"):
        sigmoid_gate(torch.zeros(1, 1, 16), None)  # type: ignore[arg-type]


def test_empty_batches_launch_nothing():
    empty = {"q": torch.zeros(0, HEADS, WIDTH), "query_start_loc": ints(0, 0, 0)}
    assert gateswa_decode(**{**decode_arguments(), **empty}).shape == (0, HEADS, WIDTH)


def test_override_chooses_the_implementation(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert implementation("sigmoid_gate", cpu).__name__.endswith("sigmoid_gate.reference")
    monkeypatch.setenv(OVERRIDE_VARIABLE, "reference")
    assert implementation("sigmoid_gate", cuda).__name__.endswith("sigmoid_gate.reference")
    monkeypatch.setenv(OVERRIDE_VARIABLE, "fast")
    with pytest.raises(AttnEditError, match="auto, reference, triton"):
        implementation("sigmoid_gate", cpu)


def test_importing_the_operators_imports_no_triton():
    names = " ".join(
        f"vllm_attnedit.ops.{name},"
        for name in (
            "gateswa_decode",
            "gateswa_prefill",
            "kv_write",
            "mla_decode",
            "mla_prefill",
            "sigmoid_gate",
        )
    ).rstrip(",")
    code = f"import sys; sys.modules['triton'] = None; import {names}; import torch; "
    code += "from vllm_attnedit.ops.sigmoid_gate import sigmoid_gate; "
    code += "print(sigmoid_gate(torch.ones(1, 1, 16), torch.zeros(1, 1))[0, 0, 0].item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0.5", done.stderr


def test_latents_that_were_never_measured_take_the_triton_kernel():
    shape = {"num_requests": 64, "qk_rope_head_dim": 64}
    assert preferred_kernel(capability_major=9, kv_lora_rank=256, **shape) == "triton"
    assert preferred_kernel(capability_major=8, kv_lora_rank=512, **shape) == "triton"
    assert preferred_kernel(capability_major=9, kv_lora_rank=512, **shape) == "fa3"
