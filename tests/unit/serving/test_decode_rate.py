"""Rows of the decode-rate benchmark: which case is measured against which."""

from __future__ import annotations

from argparse import Namespace

from benchmarks.serving.decode_rate import rows

ARGS = Namespace(model="qwen3-8b", window=128, runner=2)


def measured(rate: float) -> dict[str, dict[str, float]]:
    return {"B1 L8192": {"ttft_s": 0.5, "decode_tokens_per_s": rate}}


def test_each_case_stands_against_every_control_of_its_run():
    results = {"full": measured(100), "gateswa": measured(150), "gateswa-separate": measured(120)}
    table = rows(results, ARGS)
    ratios = {
        (row["case"].split()[2], row["control"]): row["ratio"]
        for row in table
        if row["metric"] == "decode_tokens_per_s"
    }
    assert ratios == {
        ("full", "full"): 1.0,
        ("gateswa", "full"): 1.5,
        ("gateswa-separate", "full"): 1.2,
        ("gateswa-separate", "gateswa"): 0.8,
    }
    assert {row["unit"] for row in table if row["metric"] == "ttft_s"} == {"s"}


def test_a_case_without_a_control_is_kept():
    (ttft, rate) = rows({"mla": measured(100)}, ARGS)
    assert (rate["value"], rate["control"], rate["ratio"]) == (100, None, None)
    assert ttft["metric"] == "ttft_s"
