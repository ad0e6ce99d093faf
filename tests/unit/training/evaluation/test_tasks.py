"""Tasks and passkeys, scored as by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.tiny import tiny_tokenizer
from tests.unit.training.evaluation.tasks import TASKS
from training.evaluation.passkey import passkey_found, passkey_prompts
from training.evaluation.tasks import run_tasks
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
