"""The whole suite and its report."""

from __future__ import annotations

import json

import pytest

from tests.unit.training.small import small_config, write_text
from training.evaluation.intervals import Estimate, mean_of
from training.evaluation.report import markdown, write_report
from training.evaluation.rows import Measurement, Table
from training.evaluation.suite import run_suite
from training.evaluation.variants import Variant
from vllm_attnedit.errors import AttnEditError


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


def test_a_text_that_is_too_short_is_refused_at_once(tmp_path, pair):
    short = write_text(tmp_path / "short.txt", 5)
    options = {"models": {"untrained": str(pair[1])}, "perplexity": {"s": str(short)}}
    config = small_config(tmp_path / "run", *pair, short, evaluate=options)
    with pytest.raises(AttnEditError, match=r"evaluate\.perplexity\.s.*longer text"):
        run_suite(config)
