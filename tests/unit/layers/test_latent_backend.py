"""Which backend latent layers get, on a platform that is made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend

from tests.unit.tiny import tiny_edit
from vllm_attnedit import AttnEditError
from vllm_attnedit.backends.latent import LatentBackend
from vllm_attnedit.backends.latent_cpu import LatentCPUBackend
from vllm_attnedit.layers import latent_backend as module
from vllm_attnedit.ops.mla_decode import engine_kernel, preferred_kernel

HOPPER, AMPERE = DeviceCapability(9, 0), DeviceCapability(8, 0)
TUNED = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


class Tuned(AttentionBackend):
    refusals: list[str] = []

    @classmethod
    def validate_configuration(cls, **configuration: Any) -> list[str]:
        assert configuration["use_mla"] and configuration["head_size"] == 576
        return cls.refusals


class FA3(Tuned):
    @classmethod
    def validate_configuration(cls, **configuration: Any) -> list[str]:
        reasons = super().validate_configuration(**configuration)
        if str(configuration["kv_cache_dtype"]).startswith("fp8"):
            return [*reasons, "kv_cache_dtype not supported"]
        return reasons


class FlashMLA(Tuned):
    pass


class Stock(Tuned):
    pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch):
    """A made-up GPU: call it with its capability; returns the log."""
    lines: list[str] = []

    def install(capability: DeviceCapability = HOPPER) -> list[str]:
        platform = SimpleNamespace(
            is_cuda=lambda: True, get_device_capability=lambda: capability, device_type="cuda"
        )
        monkeypatch.setattr(module, "current_platform", platform)
        classes = {"fa3": FA3, "flashmla": FlashMLA}
        monkeypatch.setattr(module, "_backend_class", classes.__getitem__)
        monkeypatch.setattr(module, "get_attn_backend", lambda *a, **k: Stock)
        log = SimpleNamespace(info_once=lambda text, *args: lines.append(text % args))
        monkeypatch.setattr(module, "logger", log)
        return lines

    yield install
    FA3.refusals = FlashMLA.refusals = []


def choose(
    edit: dict[str, Any] | None = None,
    *,
    option: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: str = "auto",
    named: Any = None,
    use_mla: bool = True,
    calculate_kv_scales: bool = False,
    dcp: int = 1,
) -> type[AttentionBackend]:
    config: Any = SimpleNamespace(
        additional_config={} if option is None else {module.BACKEND_OPTION: option},
        model_config=SimpleNamespace(dtype=dtype, use_mla=use_mla),
        cache_config=SimpleNamespace(
            cache_dtype=cache_dtype,
            block_size=16,
            user_specified_block_size=False,
            calculate_kv_scales=calculate_kv_scales,
        ),
        attention_config=SimpleNamespace(backend=named),
        parallel_config=SimpleNamespace(decode_context_parallel_size=dcp),
    )
    return module.latent_backend(config, tiny_edit("mla", **(TUNED if edit is None else edit)), 4)


def test_the_measured_kernel_serves_the_measured_latents(cuda):
    lines = cuda()
    assert choose() is FA3
    assert lines == []


def test_flashmla_stands_in_for_an_fp8_cache(cuda):
    lines = cuda()
    assert choose(cache_dtype="fp8") is FlashMLA
    assert lines == []


@pytest.mark.parametrize(
    ("edit", "settings", "reason"),
    [
        ({"kv_lora_rank": 384, "qk_rope_head_dim": 64}, {}, "latents of 384 + 64"),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 32}, {}, "latents of 512 + 32"),
        ({}, {}, "latents of 64 + 16"),
        (TUNED, {"dtype": torch.float32}, "torch.float32"),
        (TUNED, {"use_mla": False}, "VLLM_MLA_DISABLE"),
        (TUNED, {"option": "attnedit"}, "attnedit_latent_backend is attnedit"),
    ],
)
def test_the_others_get_ours_with_one_line(cuda, edit: dict, settings: dict, reason: str):
    lines = cuda()
    assert choose(edit, **settings) is LatentBackend
    (line,) = lines
    assert line.startswith("Latent layers use this project's Triton operators: ")
    assert reason in line


def test_ours_where_both_tuned_kernels_refuse(cuda):
    lines = cuda()
    FA3.refusals, FlashMLA.refusals = ["not on Mondays"], ["block_size not supported"]
    assert choose() is LatentBackend
    assert lines[0].endswith("fa3: not on Mondays; flashmla: block_size not supported.")


def test_ours_on_a_gpu_that_was_not_measured(cuda):
    cuda(AMPERE)
    assert choose() is LatentBackend


@pytest.mark.parametrize("settings", [{"option": "vllm"}, {"named": "TRITON_MLA"}])
def test_vllms_choice_on_request(cuda, settings: dict):
    cuda()
    assert choose({}, **settings) is Stock


def test_what_cannot_be_is_refused(cuda, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AttnEditError, match="vLLM has no MLA on cpu"):
        choose(option="vllm")
    assert choose() is LatentCPUBackend
    cuda()
    with pytest.raises(AttnEditError, match="attnedit_latent_backend: fast: use auto, vllm or"):
        choose(option="fast")
    with pytest.raises(AttnEditError, match="decode-context-parallel-size: 2: use 1"):
        choose({}, dcp=2)
    with pytest.raises(AttnEditError, match=r"kv_lora_rank: 520: no GPU kernel"):
        choose({"kv_lora_rank": 520})
    with pytest.raises(AttnEditError, match=r"--calculate-kv-scales: True: leave it out"):
        choose({}, calculate_kv_scales=True)
    cuda(AMPERE)
    with pytest.raises(AttnEditError, match=r"--kv-cache-dtype: fp8: use auto: .* 8\.9"):
        choose(cache_dtype="fp8")


def test_an_engine_keeps_the_kernel_that_loses_least():
    where = {"capability_major": 9, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert [preferred_kernel(num_requests=n, **where) for n in (16, 128)] == ["fa3", "flashmla"]
    assert engine_kernel(**where) == "fa3"
    assert engine_kernel(**(where | {"capability_major": 10})) == "triton"
    assert engine_kernel(**(where | {"qk_rope_head_dim": 32})) == "triton"


@pytest.mark.parametrize(
    ("device", "latent"), [("cuda", True), ("npu", True), ("cuda", False), ("cpu", True)]
)
def test_vllm_takes_latent_models_for_mla_where_it_has_that(
    device: str, latent: bool, monkeypatch: pytest.MonkeyPatch
):
    import vllm.platforms
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from tests.unit.tiny_edited import tiny_edited
    from vllm_attnedit.plugin import register_with_vllm

    register_with_vllm()
    has_mla = device != "cpu"
    platform = SimpleNamespace(is_cuda=lambda: device == "cuda", device_type=device)
    monkeypatch.setattr(vllm.platforms, "_current_platform", platform)
    config = tiny_edited("qwen3", tiny_edit("mla" if latent else "gateswa")).config
    converted = MODEL_ARCH_CONFIG_CONVERTORS["attnedit"](config, config).convert()
    assert converted.is_deepseek_mla is (has_mla and latent)
    assert converted.head_size == (64 + 16 if has_mla and latent else 32)
