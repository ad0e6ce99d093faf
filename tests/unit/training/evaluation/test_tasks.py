"""Tasks and passkeys, scored as by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.tiny import tiny_tokenizer
from tests.unit.training.evaluation.tasks import TASKS
from training.evaluation.intervals import mean_of, share_of
from training.evaluation.passkey import passkey_found, passkey_prompts
from training.evaluation.tasks import _scores, check_tasks, run_tasks
from training.models import load_tokenizer
from vllm_attnedit.errors import AttnEditError


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


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str]]:
    """What the harness asks the model to score, context and continuation; no model answers."""
    seen: list[tuple[str, str]] = []

    def note(_self, requests, **_):
        seen.extend(request.args for request in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.loglikelihood", note)
    return seen


def test_last_words_come_after_a_space(asked, pair, teacher, task_files):
    """Scored without it they would be the end of the word before, and often no token at all."""
    tokenizer = load_tokenizer(str(pair[0]))
    options: dict[str, Any] = {"limit": None, "batch": 1, "seed": 0, "folder": str(task_files)}
    rows = TASKS["words"]
    run_tasks(teacher, tokenizer, ["words"], shots=0, **options)
    assert asked == [(row["context"], " " + row["continuation"]) for row in rows]
    asked.clear()
    run_tasks(teacher, tokenizer, ["words"], shots=1, **options)
    solved = [f"{row['context']} {row['continuation']}" for row in rows]
    contexts = [f"{solved[1 - i]}\n\n{row['context']}" for i, row in enumerate(rows)]
    assert [context for context, _ in asked] == contexts


def test_examples_are_other_questions_with_their_answers(asked, pair, teacher, task_files):
    tokenizer = load_tokenizer(str(pair[0]))
    options: dict[str, Any] = {"shots": 5, "limit": None, "batch": 1, "seed": 0}
    run_tasks(teacher, tokenizer, ["choices"], folder=str(task_files), **options)
    rows = TASKS["choices"]
    solved = [f"{row['query']}\nAnswer: {row['choices'][row['gold']]}" for row in rows]
    assert len(asked) == sum(len(row["choices"]) for row in rows)
    for number, (context, _answer) in enumerate(asked):
        *examples, question = context.split("\n\n")
        own = number // 3
        assert question == f"{rows[own]['query']}\nAnswer:"
        assert sorted(examples) == sorted(solved[:own] + solved[own + 1 :])


def test_no_hit_still_has_an_interval():
    observed = {"acc": [0.0, 0.0, 0.0], "score": [0.5, 1.0, 0.5]}
    samples = [{"doc_id": i} | {n: v[i] for n, v in observed.items()} for i in range(3)]
    values = {"acc,none": 0.0, "score,none": 2 / 3}
    found = _scores({"results": {"local_x": values}, "samples": {"local_x": samples}})
    assert found["x", "acc"].estimate == share_of(0, 3)
    assert found["x", "score"].estimate == mean_of([0.5, 1.0, 0.5])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"question": "?"}'], r"odd\.jsonl, line 1.*query"),
        ([""], r"odd\.jsonl.*empty"),
        (["{broken"], r"odd\.jsonl, line 1.*JSON"),
        (['{"context": "a", "continuation": "b"}', "[1]"], r"line 2.*context, continuation"),
        (['{"query": "a", "choices": ["b", "c"], "gold": 2}'], r"line 1: gold 2.*0 to 1"),
    ],
)
def test_bad_task_files(task_files, lines, words):
    (task_files / "odd.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(AttnEditError, match=words):
        check_tasks(["odd"], str(task_files), [0])


def test_bad_tasks(pair, teacher, task_files, monkeypatch):
    check_tasks(["choices", "arc_easy"], str(task_files), [0, 5])
    with pytest.raises(AttnEditError, match=r"evaluate\.tasks: nonsense"):
        check_tasks(["choices", "nonsense"], str(task_files), [0])
    with pytest.raises(AttnEditError, match=r"evaluate\.task_files"):
        check_tasks(["choices"], str(task_files / "no"), [0])
    with pytest.raises(AttnEditError, match=r"evaluate\.fewshot: 2.*has 2 questions"):
        check_tasks(["choices", "words"], str(task_files), [0, 2])

    def unreachable(**_):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", unreachable)
    options: dict[str, Any] = {"shots": 0, "limit": None, "batch": 1, "seed": 0}
    with pytest.raises(AttnEditError, match=r"evaluate\.tasks: arc_easy.*network") as raised:
        run_tasks(teacher, load_tokenizer(str(pair[0])), ["arc_easy"], folder=None, **options)
    assert "\n" not in str(raised.value)
