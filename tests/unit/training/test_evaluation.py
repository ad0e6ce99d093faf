"""Evaluation: every number held to a plain computation of the same thing."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface

from tests.unit.tiny import tiny_tokenizer
from tests.unit.training.small import make_pair, small_config, write_text
from training.evaluation.intervals import (
    Estimate,
    exponential,
    mean_of,
    mean_over,
    share_of,
)
from training.evaluation.passkey import passkey_found, passkey_prompts
from training.evaluation.report import markdown, write_report
from training.evaluation.rows import Measurement, Table
from training.evaluation.suite import run_suite
from training.evaluation.tasks import run_tasks
from training.evaluation.text import agreement, perplexity, window_losses
from training.evaluation.variants import (
    SINKS,
    Variant,
    make_variants,
    sink_attention,
    window_edit,
)
from training.models import load_student, load_teacher, load_tokenizer
from vllm_attnedit.errors import AttnEditError


@pytest.fixture(scope="module")
def teacher(pair):
    return load_teacher(str(pair[0]), dtype=torch.float32)


@pytest.fixture(scope="module")
def student(pair):
    return load_student(str(pair[1]), dtype=torch.float32)


def ids_of(rows, length, seed=0):
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=40))
def test_intervals_of_means(values):
    found = mean_of(values)
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    half = 1.959964 * np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.half_width == pytest.approx(half, abs=1e-9)


def test_intervals_of_shares():
    assert share_of(0, 10).low == 0.0
    assert share_of(10, 10).high == pytest.approx(1.0)
    middle = share_of(50, 100)  # the textbook's example of Wilson's interval
    assert middle.low == pytest.approx(0.4038, abs=1e-4)
    assert middle.high == pytest.approx(0.5962, abs=1e-4)
    assert mean_of([3.0]) == Estimate(3.0, None, None, 1)
    assert exponential(Estimate(0.0, -1.0, 1.0, 5)).high == pytest.approx(math.e)
    both = mean_over([Estimate(1.0, 0.7, 1.3, 5), Estimate(3.0, 2.6, 3.4, 7)])
    assert (both.value, both.count) == (2.0, 12)
    assert both.half_width == pytest.approx(0.25)


def test_perplexity_is_the_librarys_loss(student):
    ids = ids_of(3, 40)
    expected = [student(row[None], labels=row[None]).loss.item() for row in ids]
    assert window_losses(student, ids, tokens=80) == pytest.approx(expected, rel=1e-5)
    assert perplexity(student, ids).value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_agreement(teacher, student):
    ids = ids_of(3, 40)
    same = agreement(teacher, teacher, ids)
    assert same["top1"].value == 1.0
    assert same["kl"].value == pytest.approx(0, abs=1e-6)
    found = agreement(student, teacher, ids, tokens=40)
    with torch.no_grad():
        p = torch.log_softmax(teacher(ids).logits[:, :-1], -1)
        q = torch.log_softmax(student(ids).logits[:, :-1], -1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert found["kl"].value == pytest.approx(kl, rel=1e-5)
    top1 = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert found["top1"].value == pytest.approx(top1)


def test_sinks_see_the_window_and_the_first_tokens():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 8, generator=draw) for _ in range(3))
    module: Any = SimpleNamespace(
        config=SimpleNamespace(sinks=3), num_key_value_groups=1, is_causal=True, training=False
    )
    output, _ = sink_attention(module, q, k, v, None, scaling=0.3, sliding_window=5)
    for t in range(20):
        seen = [s for s in range(t + 1) if t - s < 5 or s < 3]
        weights = torch.softmax(q[0, :, t, None] @ k[0][:, seen].transpose(1, 2) * 0.3, -1)
        torch.testing.assert_close(
            output[0, t], (weights @ v[0][:, seen])[:, 0], atol=1e-6, rtol=1e-5
        )
    full, _ = sink_attention(module, q, k, v, None, scaling=0.3)
    unbounded, _ = sink_attention(module, q, k, v, None, scaling=0.3, sliding_window=20)
    torch.testing.assert_close(full, unbounded)


def test_baselines_are_the_teacher_under_other_masks(pair, teacher):
    AttentionInterface.register(SINKS, sink_attention)
    ids = ids_of(2, 40)
    wide = load_teacher(
        str(pair[0]), dtype=torch.float32, attention=SINKS, edit=window_edit(4, (3,), 40)
    )
    wide.config.sinks = 2
    torch.testing.assert_close(wide(ids).logits, teacher(ids).logits, atol=1e-4, rtol=1e-4)
    narrow = load_teacher(
        str(pair[0]), dtype=torch.float32, attention=SINKS, edit=window_edit(4, (3,), 8)
    )
    narrow.config.sinks = 0
    plain = load_teacher(str(pair[0]), dtype=torch.float32, edit=window_edit(4, (3,), 8))
    torch.testing.assert_close(narrow(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    narrow.config.sinks = 4
    assert not torch.allclose(narrow(ids).logits, plain(ids).logits, atol=1e-2)


def test_an_inherited_edit_is_the_teacher_with_windows(pair, student):
    plain = load_teacher(str(pair[0]), dtype=torch.float32, edit=window_edit(4, (3,), 8))
    ids = ids_of(2, 40)
    torch.testing.assert_close(student(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_passkey_prompts(depth):
    tokenizer = tiny_tokenizer()
    ids, answers = passkey_prompts(tokenizer, 600, depth, 5)
    assert ids.shape == (5, 600)
    numbers = set()
    for row, size in zip(ids.tolist(), answers):
        prompt, answer = tokenizer.decode(row[:-size]), tokenizer.decode(row[-size:])
        assert prompt.endswith("The pass key is")
        assert f"The pass key is{answer}. Keep it in mind" in prompt
        place = prompt.index("The pass key is") / len(prompt)
        assert {0.0: place < 0.3, 0.3: 0.2 < place < 0.5, 1.0: place > 0.6}[depth]
        numbers.add(int(answer))
    assert len(numbers) == 5
    with pytest.raises(AttnEditError, match=r"evaluate\.passkey\.lengths"):
        passkey_prompts(tokenizer, 50, depth, 5)


class Parrot(torch.nn.Module):
    """Says the next token of the prompts that it was told, if they are even-numbered."""

    def __init__(self, ids):
        super().__init__()
        self.lm_head = torch.nn.Linear(512, 512, bias=False)
        torch.nn.init.eye_(self.lm_head.weight)
        self.model = self
        self._next = {tuple(row.tolist()): i for i, row in enumerate(ids)}

    def forward(self, input_ids, use_cache):
        following = input_ids.roll(-1, 1)
        wrong = torch.tensor([self._next[tuple(row.tolist())] % 2 for row in input_ids])
        following[:, -2] += wrong  # the last token of the answer
        states = torch.nn.functional.one_hot(following, 512).float()
        return SimpleNamespace(last_hidden_state=states)


def test_passkey_needs_every_token():
    ids, answers = passkey_prompts(tiny_tokenizer(), 400, 0.5, 6)
    parrot: Any = Parrot(ids)
    assert passkey_found(parrot, ids, answers, tokens=800).value == 0.5


TASKS: dict[str, list[dict[str, Any]]] = {
    "choices": [
        {"query": f"the {w}", "choices": ["land", "rain over the", "inner"], "gold": i % 3}
        for i, w in enumerate(["rain", "land", "anger", "theory", "inner", "thing"])
    ],
    "contexts": [
        {"context_options": ["the rain", "the land in"], "continuation": f"{w} ran", "gold": i % 2}
        for i, w in enumerate(["he", "there", "and"])
    ],
    "words": [{"context": "the rain over the", "continuation": w} for w in ("land", "rain")],
}


@pytest.fixture
def task_files(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in TASKS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def score(model, tokenizer, context, continuation):
    """Log-likelihood of a continuation, and whether it is what greedy decoding writes."""
    start = tokenizer(context)["input_ids"]
    whole = tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([whole])).logits[0], -1)
    places = range(len(start) - 1, len(whole) - 1)
    total = sum(logp[p, whole[p + 1]].item() for p in places)
    return total, all(logp[p].argmax().item() == whole[p + 1] for p in places)


def test_local_tasks_score_as_by_hand(pair, teacher, task_files):
    tokenizer = load_tokenizer(str(pair[0]))
    found = run_tasks(
        teacher,
        tokenizer,
        list(TASKS),
        folder=str(task_files),
        shots=0,
        limit=None,
        batch=3,
        seed=0,
    )
    right, normed = [], []
    for row in TASKS["choices"]:
        context = row["query"] + "\nAnswer:"
        scores = [score(teacher, tokenizer, context, " " + c)[0] for c in row["choices"]]
        right.append(float(int(np.argmax(scores)) == row["gold"]))
        lengths = [len(choice) for choice in row["choices"]]
        normed.append(float(int(np.argmax(np.array(scores) / lengths)) == row["gold"]))
    assert found["choices", "acc"].samples == tuple(right)
    assert found["choices", "acc_norm"].samples == tuple(normed)
    right = []
    for row in TASKS["contexts"]:
        scores = [
            score(teacher, tokenizer, c, " " + row["continuation"])[0]
            for c in row["context_options"]
        ]
        right.append(float(int(np.argmax(scores)) == row["gold"]))
    assert found["contexts", "acc"].samples == tuple(right)
    right = [
        float(score(teacher, tokenizer, r["context"], " " + r["continuation"])[1])
        for r in TASKS["words"]
    ]
    assert found["words", "acc"].samples == tuple(right)


def test_bad_tasks(pair, teacher, task_files):
    tokenizer = load_tokenizer(str(pair[0]))
    options: dict[str, Any] = {"shots": 0, "limit": None, "batch": 1, "seed": 0}
    with pytest.raises(AttnEditError, match=r"evaluate\.tasks: nonsense"):
        run_tasks(teacher, tokenizer, ["nonsense"], folder=str(task_files), **options)
    (task_files / "odd.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(AttnEditError, match=r"odd\.jsonl.*query"):
        run_tasks(teacher, tokenizer, ["odd"], folder=str(task_files), **options)
    with pytest.raises(AttnEditError, match=r"evaluate\.task_files"):
        run_tasks(teacher, tokenizer, ["choices"], folder=str(task_files / "no"), **options)


def variant(name):
    return Variant(name, f"gateswa {name}", lambda: None, {})  # type: ignore[arg-type, return-value]


def test_differences_are_paired():
    table = Table("tiny")
    right = (1.0, 0.0, 1.0, 1.0)
    table.add(variant("teacher"), Measurement("a 0-shot", "acc", "share", mean_of(right), right))
    mine = (1.0, 0.0, 1.0, 0.0)
    table.add(variant("trained"), Measurement("a 0-shot", "acc", "share", mean_of(mine), mine))
    row = table.rows[-1]
    assert row["case"] == "quality tiny gateswa trained a 0-shot"
    assert (row["value"], row["difference"], row["control"]) == (0.5, -0.25, "teacher")
    assert row["ratio"] == pytest.approx(0.5 / 0.75)
    # Only one of four questions differs: far narrower than two independent intervals.
    assert row["difference_high"] - row["difference_low"] == pytest.approx(2 * 1.959964 * 0.25)
    text = markdown("tiny", table.rows, ["teacher", "trained"], [])
    assert "| a 0-shot | acc | 75.00 ± 49.00 | 50.00 ± 56.58<br>-25.00 [-74.00, +24.00] |" in text


def test_missing_values_are_not_invented(tmp_path):
    table = Table("tiny")
    table.add(variant("trained"), Measurement("x", "found", "share", Estimate(0.5, None, None, 1)))
    write_report(tmp_path, table, [variant("trained")], {})
    row = json.loads((tmp_path / "report.json").read_text())["rows"][0]
    assert row["ratio"] is None
    assert "difference" not in row


def test_the_whole_suite(tmp_path, pair, text, task_files, monkeypatch, capsys):
    config = small_config(
        tmp_path / "run", *pair, text,
        evaluate={
            "label": "tiny", "models": {"untrained": str(pair[1])},
            "baselines": ["sinks", "chosen"], "perplexity": {"text": str(text)},
            "lengths": [32, 64, 4096], "agreement_length": 64,
            "max_windows": 4, "tasks": ["choices", "words"], "task_files": str(task_files),
            "fewshot": [0, 1], "passkey": {"lengths": [400], "depths": [0.5], "trials": 2},
        },
        choose={"text": str(text), "sequence_length": 64, "sequences": 2},
    )  # fmt: skip
    folder = run_suite(config)
    report = json.loads((folder / "report.json").read_text())
    assert {"machine", "versions", "commit", "command", "date"} <= report["provenance"].keys()
    assert list(report["provenance"]["variants"]) == ["teacher", "untrained", "sinks", "chosen"]
    cases = {(row["what"], row["metric"], row["variant"]) for row in report["rows"]}
    for name in ("teacher", "untrained", "sinks", "chosen"):
        for what, metric in (
            ("perplexity text L64", "perplexity"),
            ("choices 1-shot", "acc_norm"),
            ("mean of 2 tasks 0-shot", "acc"),
            ("passkey L400 depth50%", "found"),
            ("KV cache", "bytes a token"),
        ):
            assert (what, metric, name) in cases
    assert ("agreement text L64", "kl", "sinks") in cases
    assert not any("L4096" in what for what, _, _ in cases)  # longer than the teacher reads
    for file in ("report.md", "perplexity.png", "tasks.png", "passkey.png"):
        assert (folder / file).stat().st_size > 100


def test_variants_need_their_checkpoints(tmp_path, pair, text, latent_pair):
    config = small_config(tmp_path / "run", *pair, text)
    with pytest.raises(AttnEditError, match="run/model"):
        make_variants(config, torch.device("cpu"), torch.float32)
    options = {"models": {"mla": str(latent_pair[1])}, "baselines": ["sinks"]}
    config = small_config(tmp_path / "run", *latent_pair, text, evaluate=options)
    with pytest.raises(AttnEditError, match=r"evaluate\.baselines"):
        make_variants(config, torch.device("cpu"), torch.float32)


def test_a_text_that_is_too_short_is_refused_at_once(tmp_path, pair):
    short = write_text(tmp_path / "short.txt", 5)
    options = {"models": {"untrained": str(pair[1])}, "perplexity": {"s": str(short)}}
    config = small_config(tmp_path / "run", *pair, short, evaluate=options)
    with pytest.raises(AttnEditError, match=r"evaluate\.perplexity\.s.*longer text"):
        run_suite(config)


def test_families(tmp_path):
    """A teacher as an unedited model of this project says what transformers' own class says."""
    from transformers import AutoModelForCausalLM

    for family in ("qwen2", "qwen3", "qwen3_moe"):
        folder, _ = make_pair(tmp_path, family)
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        mine = load_teacher(str(folder), dtype=torch.float32)
        ids = ids_of(2, 30)
        torch.testing.assert_close(mine(ids).logits, own(ids).logits, atol=1e-4, rtol=1e-4)
