"""The kernel benchmark's bookkeeping: rows, the plot's points, workers that end early."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.kernels import __main__ as benchmark
from benchmarks.kernels import roofline
from benchmarks.kernels.report import Measured, Result, rows, table

DECODE = "gateswa_decode d128 h32/8 B64 L{} W128 page16 headwise"


def result():
    cases = {}
    for length, us in ((1024, 10.0), (131_072, 10.2)):
        cases[DECODE.format(length)] = Measured(
            traffic=20_000_000,
            operations=40_000_000,
            us={"ours": us, "FA3 + gate": 25.0, "vLLM Triton + gate": 20.0},
            spread={"ours": 0.01, "FA3 + gate": 0.0, "vLLM Triton + gate": 0.0},
        )
    cases["sigmoid_gate d128 h32 B8 headwise"] = Measured(
        8_000, 0, us={"ours": 2.0}, spread={"ours": 0.0}, notes={"torch": "ended its process"}
    )
    return Result(copy_gbps=4000.0, matmul_tflops=700.0, cases=cases)


def test_rows_follow_the_contract_of_committed_results():
    made = rows(result())
    for row in made:
        assert {"case", "metric", "value", "unit", "control", "ratio"} <= row.keys()
    mine = [row for row in made if row["case"] == DECODE.format(1024)]
    # Best control first; a ratio above one means that ours reaches the higher bandwidth.
    assert [row["control"] for row in mine] == ["vLLM Triton + gate", "FA3 + gate"]
    assert mine[0]["value"] == 2000.0
    assert mine[0]["ratio"] == 2.0
    assert mine[0]["share_of_copy"] == 0.5
    json.dumps(made)


def test_rows_compare_long_sequences_with_short_ones():
    (row,) = [row for row in rows(result()) if row["metric"] == "time"]
    assert row["case"] == DECODE.format(131_072)
    assert row["ratio"] == 1.02


def test_a_control_that_ended_its_process_is_told():
    (row,) = [row for row in rows(result()) if row["metric"] == "note"]
    assert (row["control"], row["note"]) == ("torch", "ended its process")
    assert table(result()).row_count == 3


def test_the_plot_is_drawn_from_the_rows(tmp_path):
    source, target = tmp_path / "result.json", tmp_path / "plot.png"
    made = rows(result())
    document = {"provenance": {"machine": "a GPU"}, "rows": made}
    source.write_text(json.dumps(document))
    found = roofline.points(made)
    assert [len(found[name]) for name in ("gateswa_decode", "sigmoid_gate")] == [2, 1]
    assert found["gateswa_decode"][0][:2] == (2.0, 2000.0)
    roofline.main([str(source), str(target)])
    assert target.stat().st_size > 1000


WORKER = """
import json, sys
cases = json.loads(sys.argv[sys.argv.index("--cases") + 1])
skip = json.loads(sys.argv[sys.argv.index("--skip") + 1])
def say(**event): print(json.dumps(event), flush=True)
if "--ceilings" in sys.argv: say(event="ceilings", copy_gbps=4000.0, matmul_tflops=700.0)
for case in cases:
    say(event="start", case=case, contestant="ours")
    say(event="case", case=case, traffic=1, operations=0)
    say(event="start", case=case, contestant="FA3")
    if case == "b" and "b::FA3" not in skip: sys.exit(7)
    for name in ("ours", "FA3"):
        if f"{case}::{name}" not in skip:
            say(event="time", case=case, contestant=name, us=2.0, spread=0.0)
    say(event="done", case=case)
"""


def test_a_contestant_that_faults_costs_only_itself(tmp_path, monkeypatch, capsys):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    popen = benchmark.subprocess.Popen
    monkeypatch.setattr(
        benchmark.subprocess,
        "Popen",
        lambda command, **more: popen([sys.executable, str(script), *command[3:]], **more),
    )
    measured = benchmark.measure(["a", "b", "c"], 1, 1)
    assert list(measured.cases["a"].us) == ["ours", "FA3"]
    assert list(measured.cases["b"].us) == ["ours"]
    assert measured.cases["b"].notes == {"FA3": "ended its process (status 7)"}
    assert list(measured.cases["c"].us) == ["ours", "FA3"]
    assert "going on without it" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--only", "nothing like it"], ["--only", "("]])
def test_a_bad_choice_of_cases_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --only: ")
