"""The commands, each a function of the configuration."""

from __future__ import annotations

from pathlib import Path

from training.config import Config
from training.data import prepare_shards
from training.export import export, newest_checkpoint
from training.models import load_tokenizer, unpack_student
from training.progress import say
from training.repack import repack
from training.runs import train
from vllm_attnedit.errors import AttnEditError


def tokenize(config: Config) -> None:
    """Make the shards of a run and nothing else."""
    folder = Path(config.data.shards or Path(config.output) / "shards")
    reader = prepare_shards(config.data, folder, load_tokenizer(config.teacher), say)
    documents = reader.manifest["documents"]
    say(f"{folder}: {reader.tokens:,} tokens, {documents:,} documents, hash {reader.hash}")


def stage1(config: Config) -> None:
    """Layer-wise teacher forcing."""
    train(config, "stage1")


def stage2(config: Config) -> None:
    """Model-level distillation."""
    train(config, "stage2")


def export_newest(config: Config) -> None:
    """Write the model of a run that has not finished, or that was carried here."""
    if config.checkpoint.export == "none":
        fix = "set it to checkpoint, edit or both to export something"
        raise AttnEditError("checkpoint.export", "none", fix)
    config.student = unpack_student(config.teacher, config.student, Path(config.output))
    for path in export(config, newest_checkpoint(config)):
        say(f"wrote {path}")


def repack_newest(config: Config) -> None:
    """Rewrite the newest checkpoint as ``checkpoint.*`` asks for."""
    say(f"wrote {repack(config, newest_checkpoint(config))}")


def evaluate(config: Config) -> None:
    """Measure and report."""
    # Slow to import, and no part of training.
    from training.evaluation.suite import run_suite

    run_suite(config)


def generate(config: Config) -> None:
    """Let the teacher write."""
    from training.generate import write_texts

    write_texts(config)


def choose_layers(config: Config) -> None:
    """Print the layers that should stay full."""
    from training.layer_choice import report_choice

    report_choice(config)
