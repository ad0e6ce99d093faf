"""The choice of full layers, held to trying every set of them."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
import torch

from tests.unit.training.small import small_config
from training.evaluation.text import window_losses
from training.layer_choice import (
    choose_full_layers,
    read_windows,
    report_choice,
    select,
    window_edit,
)
from training.models import load_teacher, load_tokenizer
from vllm_attnedit.errors import AttnEditError

SETTINGS = {"sequence_length": 96, "sequences": 3, "window": 6, "count": 2}


@pytest.fixture
def config(tmp_path, pair, text):
    return small_config(tmp_path, *pair, text, choose=SETTINGS | {"text": str(text)})


def loss_by_hand(config, full):
    edit = window_edit(4, full, SETTINGS["window"])
    model = load_teacher(config.teacher, dtype=torch.float32, edit=edit)
    ids = read_windows(config.choose.text, "", load_tokenizer(config.teacher), 96, 3)
    return sum(window_losses(model, ids)) / 3


def test_greedy_choice_is_the_best_addition_each_time(config):
    choice = choose_full_layers(config)
    singles = {layer: loss_by_hand(config, (layer,)) for layer in range(4)}
    first = min(singles, key=singles.__getitem__)
    pairs = {p: loss_by_hand(config, p) for p in combinations(range(4), 2) if first in p}
    best = min(pairs, key=pairs.__getitem__)
    assert choice.history[0][0] == first
    assert choice.history[0][1] == pytest.approx(singles[first], rel=1e-5)
    assert choice.layers == best
    assert choice.loss == pytest.approx(pairs[best], rel=1e-5)
    assert choice.full_loss == pytest.approx(loss_by_hand(config, (0, 1, 2, 3)), rel=1e-5)


def test_the_varlen_form_chooses_the_same(config):
    config.run.attention = "varlen"
    other = choose_full_layers(config)
    config.run.attention = "sdpa"
    assert other.layers == choose_full_layers(config).layers


class Table:
    """Losses that were written down."""

    def loss(self, full):
        return {0: 5.0, 1: 4.0, 2: 3.0, 3: 3.0}.get(len(full), 0.0) - (0.1 if 2 in full else 0)


def test_ties_go_to_the_first_layer():
    assert select(Table(), 4, 2).layers == (0, 2)  # type: ignore[arg-type]


def test_the_report_is_a_command_and_a_line_of_json(config, capsys):
    report_choice(config)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    listed = ",".join(map(str, result["full_layers"]))
    assert (
        lines[-2] == f"attnedit edit {config.teacher} OUT --target gateswa --full-layers {listed}"
    )


def test_bad_input(config, tmp_path):
    config.choose.count = 5
    with pytest.raises(AttnEditError, match=r"choose\.count: 5.*4 layers"):
        choose_full_layers(config)
    config.choose.text = None
    with pytest.raises(AttnEditError, match=r"choose\.text"):
        choose_full_layers(config)
    (tmp_path / "short.txt").write_text("the land")
    config.choose.text = str(tmp_path / "short.txt")
    with pytest.raises(AttnEditError, match="longer text"):
        choose_full_layers(config)


def test_sinks_are_seen_on_trial(config):
    """A window of w with s sinks: what a mask written down position by position says."""
    config.choose.sinks = 2
    choice = choose_full_layers(config, count=1)
    losses = {layer: sinks_loss_by_hand(config, layer, sinks=2) for layer in range(4)}
    assert choice.history[0][1] == pytest.approx(min(losses.values()), rel=1e-5)
    assert choice.layers == (min(losses, key=losses.__getitem__),)
    without = loss_by_hand(config, choice.layers)
    assert abs(choice.loss - without) > 1e-5


def sinks_loss_by_hand(config, full, sinks):
    model = load_teacher(
        config.teacher, dtype=torch.float32, edit=window_edit(4, (full,), SETTINGS["window"])
    )
    ids = read_windows(config.choose.text, "", load_tokenizer(config.teacher), 96, 3)
    seen = {
        kind: torch.tensor(
            [[j <= i and (i - j < window or j < sinks) for j in range(96)] for i in range(96)]
        )[None, None]
        for kind, window in (("full_attention", 96), ("sliding_attention", SETTINGS["window"]))
    }
    with torch.no_grad():
        hidden = model.model(input_ids=ids, attention_mask=seen).last_hidden_state
        logits = model.lm_head(hidden)[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()
