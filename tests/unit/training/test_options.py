"""The configuration: one table of documented options, strict about what it takes."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from training import ranges
from training.config import Config
from training.options import config_from_dict, describe_options, flatten, load_config
from vllm_attnedit.errors import AttnEditError

CONFIGS = sorted((Path(__file__).parents[3] / "training" / "configs").glob("*.yaml"))
LEAST = {"teacher": "t", "output": "o"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("teacher: t\noutput: o\ndata:\n  sources:\n    - {kind: text, path: a.txt}\n")
    return path


def test_overrides_reach_every_depth(file):
    config = load_config(
        file,
        ["--optim.tokens", "1e6", "--data.sources.0.path=b.txt", "--stage2.top-k", "64"]
        + [
            "--stage1.layers",
            "[1, 3]",
            "--evaluate.perplexity",
            "{w: x.txt}",
            "--stage1.lr",
            "1e-3",
        ],
    )
    assert config.optim.tokens == 1e6
    assert config.data.sources[0].path == "b.txt"
    assert config.stage2.top_k == 64
    assert config.stage1.layers == [1, 3]
    assert config.stage1.lr == 1e-3
    assert config.evaluate.perplexity == {"w": "x.txt"}


def test_every_option_is_documented_once():
    names = [name for name, _, _ in describe_options()]
    assert len(names) == len(set(names))
    assert all(meaning.strip() for _, _, meaning in describe_options())

    def count(cls: Any) -> int:
        hints, total = get_type_hints(cls), 0
        for item in fields(cls):
            if is_dataclass(hints[item.name]):
                total += count(hints[item.name])
                continue
            total += 1
            parts = [p for p in get_args(hints[item.name]) if is_dataclass(p)]
            total += sum(count(part) for part in parts)
        return total

    assert len(names) == count(Config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.tokenz", "1"], ["optim.tokenz", "optim.tokens"]),
        (["--optm.tokens", "1"], ["optm", "optim"]),
        (["--top_k", "5"], ["top_k", "stage2.top_k"]),
        (["--optim.batch", "many"], ["optim.batch", "many", "number"]),
        (["--optim.batch", "2.5"], ["optim.batch", "2.5", "whole"]),
        (["--optim.batch", "-1"], ["optim.batch", "-1", "above 0"]),
        (["--optim.warmup", "3"], ["optim.warmup", "between 0 and 1"]),
        (["--optim.beta2", "1"], ["optim.beta2", "below 1"]),
        (["--optim.eps", "0"], ["optim.eps", "above 0"]),
        (["--data.sequence_length", "1"], ["data.sequence_length", "at least 2"]),
        (["--evaluate.lengths", "[64, 1]"], ["evaluate.lengths.1", "at least 2"]),
        (["--evaluate.fewshot", "[0, -5]"], ["evaluate.fewshot.1", "-5", "0 or more"]),
        (["--evaluate.passkey.depths", "[1.5]"], ["evaluate.passkey.depths.0", "between 0 and 1"]),
        (
            ["--data.sources", "[{kind: text, path: p, max_tokens: -5}]"],
            ["data.sources.0.max_tokens", "-5", "above 0"],
        ),
        (["--run.precision", "fp8"], ["run.precision", "fp8", "bf16, tf32, fp32"]),
        (["--run.compile", "maybe"], ["run.compile", "maybe", "true or false"]),
        (["--data.sources.3.path", "x"], ["data.sources.3.path", "below 1"]),
        (["--seed"], ["--seed", "value"]),
        (["seed", "3"], ["seed", "--key value"]),
        (["--teacher", "null"], ["teacher", "text"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_overrides_name_field_value_and_fix(file, arguments, words):
    with pytest.raises(AttnEditError) as raised:
        load_config(file, arguments)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[1, 2]", "keys"),
        ("teacher: [", "YAML"),
        ("output: o", "teacher"),
        ("teacher: t\noutput: o\nrun: 3", "run"),
    ],
)
def test_bad_files(tmp_path, text, word):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(AttnEditError, match=word):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(AttnEditError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_ranges_name_options_that_exist():
    known = {re.sub(r"\.N\b", "", name) for name, _, _ in describe_options()}
    tables = (ranges._POSITIVE, ranges._AT_LEAST_TWO, ranges._SHARES, ranges._BELOW_ONE)
    assert known >= set().union(*tables, ranges._NOT_NEGATIVE)


def test_flatten_gives_back_what_was_set():
    config = config_from_dict(
        LEAST | {"optim": {"batch": 7}, "data": {"sources": [{"kind": "text", "path": "p"}]}}
    )
    flat = flatten(config)
    assert flat["optim.batch"] == 7
    assert flat["data.sources"][0]["path"] == "p"
    assert flat["evaluate.passkey.trials"] == 10


def test_sections_do_not_share_lists():
    first, second = config_from_dict(dict(LEAST)), config_from_dict(dict(LEAST))
    first.data.sources.append(None)  # type: ignore[arg-type]
    assert second.data.sources == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path):
    config = load_config(path)
    assert config.student is not None
    assert config.optim.batch % config.optim.micro_batch == 0
    stage = "stage1" if "stage1" in path.stem else "stage2"
    assert f"-m training {stage} training/configs/{path.name}" in path.read_text()


def test_configurations_are_shipped():
    assert {"smollm2_gateswa_stage1", "smollm2_gateswa_stage2"} <= {path.stem for path in CONFIGS}
