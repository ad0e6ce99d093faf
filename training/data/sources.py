"""Reads documents from where they are: files, chats, hub data sets, the teacher's own writing."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from training.config import SourceConfig
from training.data.chat import CONVERSATION_FIELDS, Message, read_messages
from training.files import sha256_of
from vllm_attnedit.errors import AttnEditError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".json")
TEXT_FIELDS = ("text", "content")
Item = str | list[Message]
"""A document before it is tokenised: plain text, or the messages of a conversation."""


def source_files(source: SourceConfig, field: str) -> list[Path]:
    """The files behind a source, sorted; none for a hub data set.

    Raises:
        AttnEditError: if there are none.
    """
    if source.kind == "hub":
        return []
    path = Path(source.path)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in TEXT_SUFFIXES)
    else:
        files = sorted(Path(name) for name in glob.glob(source.path, recursive=True))
        files = [file for file in files if file.is_file()]
    if not files:
        fix = "give a text file, a folder of them or a glob that matches some"
        if source.kind == "teacher":
            fix = "write it first: python -m training generate CONFIG"
        raise AttnEditError(f"{field}.path", source.path, fix)
    return files


def describe_source(source: SourceConfig, field: str) -> dict[str, Any]:
    """What identifies a source's content: its settings, and the hash of each file."""
    files = {file.name: sha256_of(file) for file in source_files(source, field)}
    settings = {k: v for k, v in asdict(source).items() if v is not None}
    # Where the files lie says nothing about what they hold.
    if files:
        settings["path"] = Path(source.path).name
    return settings | {"files": files}


def read_source(source: SourceConfig, field: str) -> Iterator[Item]:
    """The documents of a source, in a fixed order.

    Args:
        source: where and what.
        field: how the user spells the source (``data.sources.0``).

    Raises:
        AttnEditError: for a file or record that cannot be read.
    """
    if source.kind == "hub":
        yield from _hub_items(source, field)
        return
    for file in source_files(source, field):
        if source.kind == "chat":
            for number, record in enumerate(_json_records(file, field)):
                if messages := read_messages(record, source.column, f"{file}, record {number + 1}"):
                    yield messages
        elif file.suffix in (".jsonl", ".json"):
            for number, record in enumerate(_json_records(file, field)):
                yield _text_of(record, source, f"{file}, record {number + 1}")
        else:
            text = _read_text(file, field)
            yield from text.split(source.separator) if source.separator else [text]


def _read_text(file: Path, field: str) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise AttnEditError(f"{field}.path", file, f"cannot be read: {error.strerror}") from error


def _json_records(file: Path, field: str) -> Iterator[Any]:
    """JSON lines, or the members of one JSON array."""
    try:
        with file.open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
            if first.lstrip().startswith("["):
                yield from json.loads(file.read_text(encoding="utf-8"))
                return
            for line in chain([first], lines):
                if line.strip():
                    yield json.loads(line)
    except (OSError, ValueError) as error:
        fix = f"give JSON lines, or one JSON array: {error}"
        raise AttnEditError(f"{field}.path", file, fix) from error


def _text_of(record: Any, source: SourceConfig, where: str) -> str:
    names = (source.column,) if source.column else TEXT_FIELDS
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping):
        for name in names:
            if isinstance(record.get(name), str):
                return str(record[name])
    raise AttnEditError(
        where, f"no text in {' or '.join(names)}", "name the field as the source's column"
    )


def _hub_items(source: SourceConfig, field: str) -> Iterator[Item]:
    # Slow to import, and needed by this kind alone.
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = load_dataset(source.path, source.name, split=source.split, streaming=True)
    except (DatasetNotFoundError, FileNotFoundError, ValueError, ConnectionError) as error:
        fix = f"check the id, name and split: {' '.join(str(error).split())}"
        raise AttnEditError(f"{field}.path", source.path, fix) from error
    for number, row in enumerate(rows):
        where = f"{source.path}, row {number}"
        chat = source.column in row if source.column else None
        column = source.column or next(
            (n for n in (*TEXT_FIELDS, *CONVERSATION_FIELDS) if n in row), None
        )
        if column is None or chat is False:
            known = ", ".join(row)
            raise AttnEditError(f"{field}.column", source.column, f"name one of {known}")
        if isinstance(row[column], str):
            yield row[column]
        elif messages := read_messages(row, column, where):
            yield messages
