"""Bad input through the command line: one line that names field, value and fix, and status 2."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tests.unit.tiny import tiny_tokenizer
from tests.unit.training.small import make_pair, small_config, write_chats, write_text
from training.cli import main
from training.options import flatten


def write_config(path: Path, folder: Path, *material: Path) -> Path:
    """The options of a small run as a YAML file."""
    nested: dict = {}
    for name, value in flatten(small_config(folder, *material)).items():
        node = nested
        *sections, last = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    path.write_text(yaml.safe_dump(nested))
    return path


@pytest.fixture
def config(tmp_path, pair, text):
    return write_config(tmp_path / "run.yaml", tmp_path / "run", *pair, text)


def refused(capsys, *arguments):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    return errors[0]


def test_commands_run(config, tmp_path, capsys):
    main(["tokenize", str(config)])
    main(["stage1", str(config)])
    main(
        ["stage2", str(config), "--student", f"{tmp_path}/run/model", "--output", f"{tmp_path}/two"]
    )
    shutil.rmtree(tmp_path / "two" / "model")
    main(["export", str(config), "--output", f"{tmp_path}/two"])
    assert (tmp_path / "two" / "model" / "config.json").is_file()
    main(["options"])
    printed = capsys.readouterr().out
    assert "optim.tokens (default: 50000000.0)" in printed
    assert "step 6/6" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.tokenz", "5"], ["optim.tokenz", "optim.tokens"]),
        (["--optim.batch", "3"], ["optim.batch", "3", "multiple of 2"]),
        (["--data.sequence_length", "8192"], ["data.sequence_length", "8192", "2048"]),
        (["--optim.batch", "4096"], ["data.sources", "tokens", "optim.batch"]),
        (["--data.sources", "[]"], ["data.sources", "empty"]),
        (["--data.sources.0.path", "nothing.txt"], ["data.sources.0.path", "nothing.txt"]),
        (["--student", "nowhere"], ["student", "nowhere", "attnedit edit"]),
        (["--student", "null"], ["student", "missing", "attnedit edit"]),
        (["--teacher", "./nowhere"], ["teacher", "nowhere"]),
        (["--run.sharding", "fsdp2"], ["run.sharding", "fsdp2", "accelerate launch"]),
        (["--run.attention", "flex"], ["run.attention", "flex", "sdpa"]),
        (["--stage2.cache", "c"], ["stage2.cache", "c", "stage2.top_k"]),
        (
            ["--checkpoint.export", "edit", "--stage2.trainable", "all"],
            ["checkpoint.export", "edit", "stage2.trainable"],
        ),
        (["--checkpoint.resume", "there"], ["checkpoint.resume", "there", "auto"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(config, capsys, arguments, words):
    line = refused(capsys, "stage2", config, *arguments)
    for word in words:
        assert word in line


def test_teacher_and_student_that_do_not_match(config, tmp_path, capsys, text):
    other, _ = make_pair(tmp_path / "a", "llama", hidden_size=64, num_attention_heads=2)
    line = refused(capsys, "stage1", config, "--teacher", other)
    assert "student hidden_size: 128" in line
    assert "64" in line
    family, _ = make_pair(tmp_path / "b", "qwen3")
    assert "student base_model_type: llama" in refused(
        capsys, "stage1", config, "--teacher", family
    )
    plain = refused(capsys, "stage1", config, "--student", other)
    assert "student" in plain
    assert "attnedit edit" in plain


def test_a_teacher_of_other_weights(config, tmp_path, capsys):
    other, _ = make_pair(tmp_path / "a", seed=1)
    line = refused(capsys, "stage2", config, "--teacher", other)
    assert "student: " in line
    assert "edited from this teacher" in line


def test_answers_that_no_template_shows(config, tmp_path, capsys, pair):
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in pair]
    tokenizer = tiny_tokenizer()
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("message['content']", "message['content'] | upper")
    for folder in folders:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
    arguments = ["--teacher", folders[0], "--student", folders[1]]
    arguments += ["--data.sources.0.kind", "chat", "--data.sources.0.path"]
    arguments += [write_chats(tmp_path / "chats.jsonl", 60), "--data.loss_on"]
    line = refused(capsys, "stage2", config, *arguments, "answers")
    assert "data.loss_on: answers: set it to all" in line
    main([str(a) for a in ["stage2", config, *arguments, "all", "--run.minutes", "1e-9"]])


def test_tokenizers_that_do_not_match(config, tmp_path, capsys, pair):
    student = shutil.copytree(pair[1], tmp_path / "student")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["thunder"])
    tokenizer.save_pretrained(student)
    assert "student tokenizer" in refused(capsys, "stage1", config, "--student", student)
    # Shards of another tokenizer, carried here without their sources.
    main(["tokenize", str(config)])
    teacher = shutil.copytree(pair[0], tmp_path / "teacher")
    for folder in (teacher, student):
        tokenizer.save_pretrained(folder)
    line = refused(
        capsys, "stage1", config, "--student", student, "--teacher", teacher, "--data.sources", "[]"
    )
    assert "data.shards" in line
    assert "tokenizer" in line


def test_a_changed_configuration_and_changed_data(config, tmp_path, capsys):
    main(["stage1", str(config), "--run.minutes", "1e-9"])
    line = refused(capsys, "stage1", config, "--optim.beta2", "0.99")
    assert "optim.beta2: 0.99" in line
    assert "0.95" in line
    other = write_text(tmp_path / "other.txt", seed=9)
    line = refused(capsys, "stage1", config, "--data.sources.0.path", other)
    assert "data.shards" in line


def test_usage_errors_leave_with_two(capsys):
    for arguments in (["fly"], ["stage1"], []):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["stage1", "--help"])
    assert ended.value.code == 0
