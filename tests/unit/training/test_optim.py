"""The learning rate of every step, and what a model's definition says it costs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.tiny import tiny_config, tiny_edit
from training.config import OptimConfig
from training.data.batches import make_batch
from training.data.packing import Sequence
from training.flops import model_cost, peak_tflops, visible_pairs
from training.optim import Group, Schedule, build_optimizer, set_lr
from vllm_attnedit.config import AttnEditConfig


def test_the_rate_rises_falls_and_ends_at_its_floor():
    schedule = Schedule(steps=101, warmup=10, floor=0.01)
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert all(a < b for a, b in itertools.pairwise(factors[:11]))
    assert factors[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[-1] == pytest.approx(0.01)
    assert factors[55] == pytest.approx((1 + 0.01) / 2, abs=1e-9)


def test_one_step_and_no_warmup():
    assert Schedule(steps=1, warmup=0, floor=0.1).factor(0) == 1.0


def test_lost_moments_make_it_rise_again():
    plain, lost = Schedule(100, 10, 0.0), Schedule(100, 10, 0.0, restarted=50)
    assert lost.factor(50) == pytest.approx(plain.factor(50) / 11)
    assert lost.factor(60) == plain.factor(60)


def test_groups_keep_their_rates_and_vectors_do_not_decay():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [
        Group("attention", 1.0, dict(first.named_parameters())),
        Group("rest", 0.1, dict(second.named_parameters())),
    ]
    optimizer = build_optimizer(groups, OptimConfig(weight_decay=0.3), torch.device("cpu"))
    assert set_lr(optimizer, 0.5) == 0.5
    found = [(g["lr"], g["weight_decay"], g["params"][0].ndim) for g in optimizer.param_groups]
    assert found == [(0.5, 0.3, 2), (0.5, 0.0, 1), (0.05, 0.3, 2), (0.05, 0.0, 1)]


def documents(*lengths):
    ids = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    flags = np.ones(len(ids), dtype=bool)
    return make_batch(
        [Sequence(np.zeros(len(ids), np.int64), ids, flags)], (0,), answers_only=False
    )


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_pairs_are_those_of_the_mask(window):
    batch = documents(4, 1, 9)
    behind = np.arange(14)[:, None] - np.arange(14)
    same = batch.documents[0].numpy()[:, None] == batch.documents[0].numpy()
    seen = (behind >= 0) & same & (True if window is None else behind < window)
    assert visible_pairs([batch, batch], window) == 2 * seen.sum()


def test_costs_are_counted_from_the_tensors():
    config = tiny_config("llama")
    edited = AttnEditConfig(
        base_model_type="llama", attention_edit=tiny_edit("gateswa"), **config.to_dict()
    )
    cost = model_cost(edited)
    projections = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 4 * 128  # q, k and v, o, gate
    assert cost.attention == 2 * 4 * projections
    assert cost.output == 2 * 4 * 128 * 128
    assert cost.mlp == 2 * 4 * 3 * 128 * 256
    assert cost.head == 2 * 128 * 512
    assert cost.pairs([documents(14)]) == 4 * 128 * (105 + 3 * visible_pairs([documents(14)], 8))


def test_a_mixture_counts_the_experts_that_a_token_visits():
    dense = AttnEditConfig(base_model_type="qwen3", **tiny_config("qwen3").to_dict())
    mixture = AttnEditConfig(base_model_type="qwen3_moe", **tiny_config("qwen3_moe").to_dict())
    router = 2 * 4 * 4 * 128
    visited = 2 * 4 * 2 * 3 * 128 * 64
    assert model_cost(mixture).mlp == router + visited
    assert model_cost(dense).pair_full == model_cost(mixture).pair_full == 4 * 4 * 128


def test_latent_layers_pay_for_their_widths():
    config = tiny_config("llama").to_dict()
    edited = AttnEditConfig(base_model_type="llama", attention_edit=tiny_edit("mla"), **config)
    assert model_cost(edited, [0]).pair_full == 2 * 4 * (48 + 32)


def test_peaks_by_name():
    assert peak_tflops("NVIDIA H200") == peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA GH200 480GB") == 989.0
    assert peak_tflops("NVIDIA L4") == 121.0
    assert peak_tflops("NVIDIA L40") is None
    assert peak_tflops("Some GPU") is None
